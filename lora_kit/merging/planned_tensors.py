"""What a merge writes: files, their tensors, and what is added to each."""

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
    """An adapter, and how much of it is merged."""

    name: str
    adapter: Adapter
    weight: float = 1.0


@dataclass(frozen=True)
class WeightUpdate:
    """scaling · B A, to be added to one weight, or to one matrix of several.

    Attributes:
        pair: of a parameter with several matrices, that of one of them.
        expert: which matrix that is.
    """

    pair: LoraWeights
    scaling: float
    expert: int = 0

    def rows(self, begin: int, end: int) -> WeightUpdate:
        """What it adds to some rows of the weight."""
        return replace(self, pair=replace(self.pair, b=self.pair.b[begin:end]))


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result; of a weight that is quantised again, all that it is stored in.

    Attributes:
        name: in its file.
        source: the base's tensor, or what an adapter brings instead of it.
        dtype: of the result.
        how: `copied`, `cast`, `dequantized`, `folded`, `requantized`, `replaced`, `added`, or `with new rows`.
        path: of the module, where an adapter changes it.
        updates: what is folded into it.
        transposed: whether it is kept as (in, out), or each of its matrices is.
        rows: that take the places of some of its own.
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
        """What it is written as, in the order of the bytes."""
        if self.how == "requantized" and isinstance(self.source, QuantizedWeight):
            parts = self.source.parts
            return {name: (parts[name].dtype, shape) for name, shape in self.source.sizes().items()}
        return {self.name: (self.dtype, self.source.shape)}

    @property
    def matrices(self) -> tuple[PlannedTensor, ...]:
        """An entry for each matrix of it, in the order of their bytes."""
        if self.source.ndim == 2 or isinstance(self.source, QuantizedWeight):
            return (self,)
        if self.updates[0].pair.kind == "convolution":
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
        shards: their names, metadata and tensors, in the order of their bytes.
        untied: keys that shared a parameter in the base and no longer do.
        left_out: tensors of the base that the merged model has no place for.
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
        """Tensors of the result by what is done to them."""
        return dict(Counter(entry.how for entry in self.entries))
