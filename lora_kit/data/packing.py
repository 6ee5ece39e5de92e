"""Packing: several samples in one row, so that little is padded; each is computed as if it were alone.

Positions that restart at 0 mark where the samples of a row begin. From them transformers builds a mask that keeps
attention inside each sample, if the model's code asks for one and no other mask is passed. A probe of the loaded model
finds out whether this holds; no list of model families is needed.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_kit.data.batches import EncodedDataset
from lora_kit.models.tasks import NEXT
from lora_kit.torch_utils import use_eval_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PackedDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of several samples.

    Attributes:
        samples: samples of the kind `token`.
        rows: indices of the samples in each row.
        max_length: most tokens of a row.
        kind: kind of the samples.
    """

    samples: EncodedDataset
    rows: tuple[tuple[int, ...], ...]
    max_length: int
    kind: str = NEXT

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `input_ids`, `labels` and `position_ids`, which restart at 0 with each sample: int64 (length,)."""
        parts = [self.samples[sample] for sample in self.rows[index]]
        row = {name: torch.cat([part[name] for part in parts]) for name in ("input_ids", "labels")}
        return {**row, "position_ids": torch.cat([torch.arange(len(part["input_ids"])) for part in parts])}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row: int64 (rows,)."""
        return torch.stack([self.samples.lengths[list(row)].sum() for row in self.rows])

    @property
    def num_labels(self) -> int:
        """Tokens that are predicted."""
        return self.samples.num_labels

    @property
    def filled(self) -> float:
        """Share of tokens that are not padding if every row is padded to `max_length`."""
        return self.samples.num_tokens / (len(self) * self.max_length)


def pack(samples: EncodedDataset, *, max_length: int, seed: int) -> PackedDataset:
    """Pack samples into few rows by best-fit decreasing: the longest first, each into the fullest row it fits.

    Args:
        samples: samples of the kind `token`, none longer than a row.
        max_length: most tokens of a row.
        seed: decides the order of samples of one length.
    """
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    order = order[samples.lengths[order].argsort(descending=True, stable=True)]
    rows: list[list[int]] = []
    capacities: list[int] = []  # free tokens of the rows that are not full: sorted, each number once
    rows_by_capacity: dict[int, list[int]] = defaultdict(list)
    for sample, length in zip(order.tolist(), samples.lengths[order].tolist(), strict=True):
        best = bisect_left(capacities, length)
        if best == len(capacities):
            row, capacity = len(rows), max_length
            rows.append([])
        else:
            capacity = capacities[best]
            row = rows_by_capacity[capacity].pop()
            if not rows_by_capacity[capacity]:
                del capacities[best]
        rows[row].append(sample)
        remaining = capacity - length
        if remaining and not rows_by_capacity[remaining]:
            insort(capacities, remaining)
        if remaining:
            rows_by_capacity[remaining].append(row)
    return PackedDataset(samples, tuple(map(tuple, rows)), max_length)


_PROBE_LENGTHS = (5, 3, 4)
"""Tokens of each sample in a row of the probe."""


def reason_not_packable(model: PreTrainedModel) -> str | None:
    """Return why a model cannot compute packed samples as if each were alone, or None if it can.

    Two things must hold in a batch of two rows of random tokens: the logits of a sample have no gradient at all with
    respect to the embeddings of another one, and they equal those of the sample alone, up to rounding.
    """
    if not {"position_ids", "kwargs"} & set(inspect.signature(model.forward).parameters):
        return "it takes no positions"
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    ids = torch.randint(len(embedding), (2, sum(_PROBE_LENGTHS)), generator=torch.Generator().manual_seed(0))
    ids = ids.to(embedding.device)
    positions = torch.cat([torch.arange(length) for length in _PROBE_LENGTHS]).expand_as(ids).to(ids.device)
    with use_eval_mode(model):
        logits, embedded = _run_with_embeddings(model, input_ids=ids, position_ids=positions)
        if not all(_sees_only(own, logits, embedded) for own in _probe_slices()):
            return "its tokens see those of other samples in their row"
        if not all(_matches_alone(model, ids[:, own], logits[:, own].detach()) for own in _probe_slices()):
            return "it computes other logits for a sample in a row than for the sample alone"
    return None


def _probe_slices() -> list[slice]:
    """Return where the samples of a row of the probe are."""
    ends = torch.tensor([0, *_PROBE_LENGTHS]).cumsum(0).tolist()
    return [slice(start, end) for start, end in pairwise(ends)]


def _run_with_embeddings(model: PreTrainedModel, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of a model, and the embeddings of its tokens, from which the logits have a graph."""
    embedded: list[Tensor] = []

    def detach_embeddings(module: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = model.get_input_embeddings().register_forward_hook(detach_embeddings)
    try:
        with torch.enable_grad():
            return model(**inputs, use_cache=False).logits, embedded[0]
    finally:
        hook.remove()


def _sees_only(own: slice, logits: Tensor, embedded: Tensor) -> bool:
    """Return whether the logits of a sample in the first row depend on its own tokens, and on no other.

    Args:
        own: positions of the sample.
        logits: (rows, length, vocabulary).
        embedded: the embeddings that the logits were computed from: (rows, length, d).
    """
    weights = torch.linspace(-1, 1, logits[0, own].numel(), device=logits.device).view_as(logits[0, own])
    gradient = torch.autograd.grad((logits[0, own].float() * weights).sum(), embedded, retain_graph=True)[0]
    seen = gradient[0].abs().amax(-1).nonzero().flatten().tolist()
    return bool(seen) and all(own.start <= position < own.stop for position in seen)


def _matches_alone(model: PreTrainedModel, ids: Tensor, logits: Tensor) -> bool:
    """Return whether a sample alone gives these logits, up to rounding.

    Args:
        ids: int64 (rows, length).
        logits: the sample's logits in a packed row: (rows, length, vocabulary).
    """
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    dtypes = {tensor.dtype for tensor in (*model.parameters(), logits) if tensor.is_floating_point()}
    rounding = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
    return bool((logits - alone).abs().max() <= rounding * alone.abs().max())
