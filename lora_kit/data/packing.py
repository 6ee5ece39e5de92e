"""Several samples in one row, so that little is padded; each is computed as if it were alone.

A row says where its samples begin by positions that start again at 0. From them transformers makes a mask that keeps
attention inside each sample, if a model's code asks for one and no other mask is given. Whether a model that is loaded
does so is found out by a probe: nothing is known about families of models.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lora_kit.data.batches import EncodedDataset
from lora_kit.models.tasks import NEXT
from lora_kit.torch_utils import use_eval_mode


@dataclass(frozen=True)
class PackedDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of several samples.

    Attributes:
        samples: of the kind `token`.
        rows: the places of the samples in each row.
        max_length: tokens of a row at the most.
    """

    samples: EncodedDataset
    rows: tuple[tuple[int, ...], ...]
    max_length: int
    kind: str = NEXT

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids`, `labels` and `position_ids`, which begin at 0 with each sample: int64 (length,)."""
        parts = [self.samples[place] for place in self.rows[index]]
        row = {name: torch.cat([part[name] for part in parts]) for name in ("input_ids", "labels")}
        return {**row, "position_ids": torch.cat([torch.arange(len(part["input_ids"])) for part in parts])}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[index] for index in range(len(self)))

    @property
    def num_labels(self) -> int:
        """Tokens that are predicted."""
        return self.samples.num_labels

    @property
    def filled(self) -> float:
        """The share of the rows' tokens that is not padding where every row has `max_length`."""
        return self.samples.num_tokens / (len(self) * self.max_length)


def pack(samples: EncodedDataset, *, max_length: int, seed: int) -> PackedDataset:
    """Put samples into as few rows as may be: the longest first, each into the fullest row that has room for it.

    Args:
        samples: of the kind `token`, none longer than a row.
        max_length: tokens of a row at the most.
        seed: decides which of the samples of one length come first.
    """
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    order = order[samples.lengths[order].argsort(descending=True, stable=True)]
    rows: list[list[int]] = []
    rooms: list[int] = []  # that rows have left, sorted, each once
    rows_with: dict[int, list[int]] = defaultdict(list)
    for place, length in zip(order.tolist(), samples.lengths[order].tolist(), strict=True):
        fitting = bisect_left(rooms, length)
        if fitting == len(rooms):
            row, room = len(rows), max_length
            rows.append([])
        else:
            room = rooms[fitting]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[fitting]
        rows[row].append(place)
        left = room - length
        if left and not rows_with[left]:
            insort(rooms, left)
        if left:
            rows_with[left].append(row)
    return PackedDataset(samples, tuple(map(tuple, rows)), max_length)


_PROBE_LENGTHS = (5, 3, 4)
"""Tokens of the samples in a row of the probe."""


def reason_not_packable(model: Any) -> str:
    """What keeps a model from computing packed samples as if each were alone; empty where nothing does.

    Two things must hold, in a batch of two rows of random tokens: the logits of a sample have no gradient at all with
    respect to the embeddings of another one, and they are those of the sample alone, up to rounding.
    """
    if not {"position_ids", "kwargs"} & set(inspect.signature(model.forward).parameters):
        return "it takes no positions"
    device, vocabulary = next(model.parameters()).device, model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (2, sum(_PROBE_LENGTHS)), generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.cat([torch.arange(length) for length in _PROBE_LENGTHS]).expand_as(ids).to(device)
    with use_eval_mode(model):
        logits, embedded = _run_with_embeddings(model, input_ids=ids, position_ids=positions)
        for own in _probe_slices():
            weights = torch.linspace(-1, 1, logits[0, own].numel(), device=device).view_as(logits[0, own])
            reached = torch.autograd.grad((logits[0, own].float() * weights).sum(), embedded, retain_graph=True)[0]
            seen = reached[0].abs().amax(-1).nonzero().flatten().tolist()
            if not seen or any(place not in range(own.start, own.stop) for place in seen):
                return "its tokens see those of other samples in their row"
        for own in _probe_slices():
            with torch.no_grad():
                alone = model(input_ids=ids[:, own], attention_mask=torch.ones_like(ids[:, own]), use_cache=False)
            if not _is_within_rounding(logits[:, own].detach(), alone.logits, model):
                return "it computes other logits for a sample in a row than for the sample alone"
    return ""


def _probe_slices() -> list[slice]:
    """Where the samples of a row of the probe stand."""
    ends = torch.tensor([0, *_PROBE_LENGTHS]).cumsum(0).tolist()
    return [slice(start, end) for start, end in pairwise(ends)]


def _run_with_embeddings(model: Any, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of a model, and the embeddings of its tokens, which they have gradients for."""
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            return model(**inputs, use_cache=False).logits, kept[0]
    finally:
        hook.remove()


def _is_within_rounding(found: Tensor, expected: Tensor, model: Any) -> bool:
    """Whether logits differ by no more than rounding may have made of them."""
    dtypes = {tensor.dtype for tensor in (*model.parameters(), found) if tensor.is_floating_point()}
    rounding = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
    return bool((found - expected).abs().max() <= rounding * expected.abs().max())
