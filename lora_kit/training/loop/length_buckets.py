"""A batch done in parts of like lengths: less padding to compute, and activations of one part at a time to keep.

The loss of a step is a sum over labels divided by their number, so it does not matter in how many parts it is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from torch import Tensor

from lora_kit.data.batches import IGNORE_INDEX

BUCKET_OVERHEAD_TOKENS: Final = {"cpu": 64, "cuda": 2048}
"""What a part costs by itself, in tokens: weights that are read again, kernels that are launched again. Measured on a
CPU (14 to 110, layers 256 to 1,024 wide); estimated for a GPU, from the launches of a model of a billion weights."""


def count_batch_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """How many tokens a batch has, padding left out and what a decoder writes counted too: int64 ()."""
    read = batch["attention_mask"].sum()
    return read + (batch["labels"] != IGNORE_INDEX).sum() if "decoder_input_ids" in batch else read


def split_by_length(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The rows of a batch in parts, the longest rows first, each part padded to its own longest row.

    Args:
        batch: of a `Collator`: `attention_mask` (rows, length), and more tensors (rows, length) or (rows,).
    """
    mask = batch["attention_mask"]
    lengths, order = mask.sum(1).sort(descending=True, stable=True)
    cost = BUCKET_OVERHEAD_TOKENS["cpu" if mask.device.type == "cpu" else "cuda"]
    sizes = choose_bucket_sizes(lengths.tolist(), part=cost)
    return [
        _trim_padding({name: tensor[rows] for name, tensor in batch.items()}, read=int(longest[0]))
        for rows, longest in zip(order.split(sizes), lengths.split(sizes), strict=True)
    ]


def _trim_padding(part: Mapping[str, Tensor], *, read: int) -> dict[str, Tensor]:
    """A part without the padding that all its rows have; what a decoder reads and writes has a length of its own."""
    written = int((part["labels"] != IGNORE_INDEX).sum(1).max()) if "decoder_input_ids" in part else read
    ends = {"labels": written, "decoder_input_ids": written}
    # Of rows of several samples the positions tell where attention ends; beside a mask they would be passed over.
    passed_over = {"attention_mask"} if "position_ids" in part else set()
    return {
        name: tensor[:, : ends.get(name, read)] if tensor.ndim > 1 else tensor
        for name, tensor in part.items()
        if name not in passed_over
    }


def choose_bucket_sizes(lengths: Sequence[int], *, part: int) -> list[int]:
    """Rows of each part, so that Σ (rows · longest + part) is least.

    Args:
        lengths: of the rows, the longest first.
        part: what a part costs by itself, in tokens.
    """
    least, first = [0], [0]  # of the first rows alone: the least cost, and where the last of their parts begins
    for end in range(1, len(lengths) + 1):
        costs = [least[start] + (end - start) * lengths[start] + part for start in range(end)]
        least.append(min(costs))
        first.append(costs.index(least[-1]))
    sizes: list[int] = []
    end = len(lengths)
    while end:
        sizes.append(end - first[end])
        end = first[end]
    return sizes[::-1]
