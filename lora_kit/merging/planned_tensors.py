"""The plan of a merge: the files to write, their tensors, and what is added to each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.peft_keys import LoraWeights, TokenEmbeddings
from lora_kit.merging.checkpoint.bnb_weights import QuantizedWeight
from lora_kit.merging.checkpoint.shards import Shard


class WeightedAdapter(NamedTuple):
    """An adapter to merge.

    Attributes:
        name: what messages call it.
        adapter: its value.
        weight: that its update is multiplied by.
    """

    name: str
    adapter: Adapter
    weight: float = 1.0


@dataclass(frozen=True)
class WeightUpdate:
    """scaling · B A, to be added to a weight, or to one matrix of a stacked one.

    Attributes:
        weights: A and B, of this matrix alone.
        scaling: with the weight of the adapter in it.
        expert: index of the matrix.
    """

    weights: LoraWeights
    scaling: float
    expert: int = 0

    def rows(self, begin: int, end: int) -> WeightUpdate:
        """Return what it adds to some rows of the weight."""
        return replace(self, weights=replace(self.weights, b=self.weights.b[begin:end]))


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result; for a requantized weight, all tensors that store it.

    Attributes:
        name: in its file.
        source: the base's tensor, or the adapter's in place of it.
        dtype: of the result.
        how: `copied`, `cast`, `dequantized`, `folded`, `requantized`, `replaced`, `added`, or `with new rows`.
        path: of the module, where an adapter changes it.
        updates: folded into it.
        transposed: whether it, or each of its matrices, is stored as (in, out).
        rows: token embeddings that replace some of its rows.
    """

    name: str
    source: Tensor | QuantizedWeight
    dtype: torch.dtype
    how: str
    path: str = ""
    updates: tuple[WeightUpdate, ...] = ()
    transposed: bool = False
    rows: TokenEmbeddings | None = None

    @property
    def stored(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Dtype and shape of every stored tensor by name, in the order of their bytes."""
        if self.how == "requantized" and isinstance(self.source, QuantizedWeight):
            parts = self.source.parts
            return {name: (parts[name].dtype, shape) for name, shape in self.source.sizes().items()}
        return {self.name: (self.dtype, self.source.shape)}

    @property
    def matrices(self) -> tuple[PlannedTensor, ...]:
        """A plan for each of its matrices, in the order of their bytes."""
        if self.source.ndim == 2 or isinstance(self.source, QuantizedWeight):
            return (self,)
        if self.updates[0].weights.kind == "convolution":
            return (replace(self, source=self.source.flatten(1)),)
        each = [tuple(update for update in self.updates if update.expert == e) for e in range(self.source.shape[0])]
        return tuple(replace(self, source=w, updates=own) for w, own in zip(self.source, each, strict=True))

    @property
    def nbytes(self) -> int:
        return sum(dtype.itemsize * shape.numel() for dtype, shape in self.stored.values())


@dataclass(frozen=True)
class MergePlan:
    """The weight files of the result.

    Attributes:
        shards: the base's file that each is made from, and its tensors in the order of their bytes.
        untied: keys that were one parameter in the base and no longer are.
        left_out: tensors of the base that the merged model does not have.
    """

    shards: tuple[tuple[Shard, tuple[PlannedTensor, ...]], ...]
    untied: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def entries(self) -> Iterator[PlannedTensor]:
        return (entry for _, entries in self.shards for entry in entries)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors are made in each way (`PlannedTensor.how`)."""
        return dict(Counter(entry.how for entry in self.entries))
