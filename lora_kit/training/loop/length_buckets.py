"""A batch split into parts of similar lengths: less padding, and activations of only one part at a time in memory.

The loss of a step is a sum over labels divided by their number, so the number of parts does not change it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from lora_kit.data.batches import IGNORE_INDEX

BUCKET_OVERHEAD_TOKENS: Final = {"cpu": 64, "cuda": 2048}
"""Fixed cost of a part in tokens: reading the weights and launching the kernels once more. Measured on a CPU (14 to
110, layers 256 to 1,024 wide); estimated for a GPU, from the launches of a model of a billion weights."""


def count_batch_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the number of tokens of a batch without padding, those of a decoder included: int64 ()."""
    inputs = batch["attention_mask"].sum()
    return inputs + (batch["labels"] != IGNORE_INDEX).sum() if "decoder_input_ids" in batch else inputs


def split_by_length(batch: Mapping[str, Tensor], *, computed: float = 1.0) -> list[dict[str, Tensor]]:
    """Return the rows of a batch in parts, the longest rows first, each part padded to its own longest row.

    A batch that is best computed whole keeps its order.

    Args:
        batch: from a `Collator`: `attention_mask` (rows, length), and more tensors (rows, length, …) or (rows,).
        computed: share of the work on a token that is left to do, where layers are left out: the less, the more tokens
            the fixed cost of a part is worth.
    """
    mask = batch["attention_mask"]
    lengths, order = mask.sum(1).sort(descending=True, stable=True)
    sizes = choose_bucket_sizes(lengths.tolist(), overhead=_choose_overhead(mask.device, computed))
    if len(sizes) == 1:
        return [_trim_padding(batch, length=int(lengths[0]))]
    return [
        _trim_padding({name: tensor[rows] for name, tensor in batch.items()}, length=int(longest[0]))
        for rows, longest in zip(order.split(sizes), lengths.split(sizes), strict=True)
    ]


def _choose_overhead(device: torch.device, computed: float) -> int:
    return round(BUCKET_OVERHEAD_TOKENS["cpu" if device.type == "cpu" else "cuda"] / computed)


def trim_batch(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch as one part, its rows in their order."""
    return _trim_padding(batch, length=int(batch["attention_mask"].sum(1).max()))


def _trim_padding(part: Mapping[str, Tensor], *, length: int) -> dict[str, Tensor]:
    """Return a part without the padding that all its rows have; a decoder's tensors have a length of their own."""
    decoder_length = int((part["labels"] != IGNORE_INDEX).sum(1).max()) if "decoder_input_ids" in part else length
    lengths = {"labels": decoder_length, "decoder_input_ids": decoder_length}
    # In packed rows the position ids say where attention ends; a model given a mask as well would ignore them.
    dropped = {"attention_mask"} if "position_ids" in part else set()
    # Numbers to be predicted, one for each class, have no position.
    untrimmed = {"labels"} if part["labels"].is_floating_point() else set()
    return {
        name: tensor[:, : lengths.get(name, length)] if tensor.ndim > 1 and name not in untrimmed else tensor
        for name, tensor in part.items()
        if name not in dropped
    }


def choose_bucket_sizes(lengths: Sequence[int], *, overhead: int) -> list[int]:
    """Return the number of rows of each part that minimizes Σ (rows · longest + overhead) over the parts.

    Args:
        lengths: of the rows in tokens, the longest first.
        overhead: fixed cost of a part, in tokens.
    """
    least, first = [0], [0]  # for the first n rows: the least cost, and the row at which their last part begins
    for end in range(1, len(lengths) + 1):
        costs = [least[start] + (end - start) * lengths[start] + overhead for start in range(end)]
        least.append(min(costs))
        first.append(costs.index(least[-1]))
    sizes: list[int] = []
    end = len(lengths)
    while end:
        sizes.append(end - first[end])
        end = first[end]
    return sizes[::-1]


class LargestPart(NamedTuple):
    """A part that no batch has a larger one than.

    Attributes:
        longest: index of its longest row.
        shorter: index of a shorter row that may be in it; that of the longest if there is none.
        rows: number of its rows.
    """

    longest: int
    shorter: int
    rows: int


def find_largest_parts(lengths: Tensor, *, rows: int, device: torch.device, computed: float = 1.0) -> set[LargestPart]:
    """Return the parts that take most memory of all that batches may be split into.

    Of an optimal split no part is cheaper in two: with its rows sorted by length, (k - i)(l[0] - l[i]) <= overhead for
    each i of its k rows. Of all rows those that are next to each other in length keep to that the longest.

    Args:
        lengths: of all rows in tokens, the longest first: int64 (samples,).
        rows: of a batch.
        device: what the batches are on.
        computed: as of `split_by_length`.

    Returns:
        Those with most tokens, with most entries of attention, and with most of what lies between the two.
    """
    overhead = _choose_overhead(device, computed)
    counts, indices = torch.arange(1, rows + 1)[:, None], torch.arange(rows)
    begins = torch.cat([torch.ones(1, dtype=torch.bool), lengths.diff() != 0]).nonzero().flatten().tolist()
    parts = []
    for start, shorter in zip(begins, [*begins[1:], begins[-1]], strict=True):
        differences = lengths[start] - lengths[start : start + rows]
        most = len(differences)
        costs = (counts[:most] - indices[:most]).clamp(min=0) * differences
        fits = int(lengths[start] - lengths[shorter]) <= overhead
        parts.append(LargestPart(start, shorter if fits else start, int((costs <= overhead).all(1).sum())))
    powers = (1, 1.5, 2)
    return {max(parts, key=lambda part: part.rows * int(lengths[part.longest]) ** power) for power in powers}
