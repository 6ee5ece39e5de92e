"""Folding a slot of a layer into its base weight: accumulated in fp32, rounded once; and how much of it survived.

`RetentionTally` is the one definition of what survives: a merge in memory and a merge of files both use it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from lora_kit.errors import MergeError
from lora_kit.layers.conv import LoraConvolution
from lora_kit.layers.introspect import is_quantized, unwrap_module
from lora_kit.layers.linear import LoraLinear
from lora_kit.layers.own_forward import reason_not_mergeable
from lora_kit.layers.slot_layer import SlotLayer
from lora_kit.layers.unstacked_layer import UpdatedWeightLayer

_SUM_ELEMENTS: Final = 2**22
"""Values whose squares are added up in fp32; the sums of such blocks are added up in double precision."""


@dataclass(frozen=True)
class Retention:
    """How much of one layer's delta survived when it was folded into a weight.

    Attributes:
        path: of the layer.
        relative: |delta| / |weight| in Frobenius norms; 0 for a zero delta, infinite for another one of a zero weight.
        retained: 1 - |merged - (weight + delta)| / |delta|, at least 0: the share that survived rounding to the
            weight's dtype; 1 for a zero delta.
    """

    path: str
    relative: float
    retained: float


@dataclass
class RetentionTally:
    """The sums behind a `Retention`, added up block by block.

    Attributes:
        path: of the layer.
        dtype: of the merged weight.
        weight: |weight|².
        delta: |delta|².
        lost: |merged - (weight + delta)|².
    """

    path: str
    dtype: torch.dtype
    weight: float = 0.0
    delta: float = 0.0
    lost: float = 0.0

    def add_lost(self, lost: Tensor) -> None:
        """Add a block of `weight + delta - merged`.

        Raises:
            MergeError: it is not finite, so the merged weight is not.
        """
        self.lost += sum_squares(lost)
        if not math.isfinite(self.lost):
            raise MergeError(f"{self.path}: the merged weight is not finite in {self.dtype}")

    def compute_retention(self) -> Retention:
        """Return the shares, once every block was added."""
        if not self.delta:
            return Retention(self.path, 0.0, 1.0)
        relative = math.sqrt(self.delta / self.weight) if self.weight else math.inf
        return Retention(self.path, relative, max(0.0, 1 - math.sqrt(self.lost / self.delta)))


def sum_squares(tensor: Tensor) -> float:
    """Return the squared Frobenius norm."""
    return sum(float(block @ block) for block in tensor.reshape(-1).split(_SUM_ELEMENTS))


@torch.no_grad()
def fold_slot(path: str, layer: SlotLayer, slot: int) -> tuple[Tensor, Retention]:
    """Return weight + scaling · B A (rescaled by row for a DoRA), in the weight's own dtype and layout.

    Raises:
        MergeError: the result is not finite.
    """
    entry = layer.entries[slot]
    assert entry is not None
    weight = weight_of(layer)
    exact = weight.float()
    merged, retention = round_to_dtype(path, exact, layer.compute_updated_weight(entry, exact), weight.dtype)
    return merged.contiguous(), retention


def round_to_dtype(path: str, exact: Tensor, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Retention]:
    """Return `target` rounded to the dtype, and what survives of `target - exact`.

    Args:
        exact: the weight before the merge, fp32.
        target: weight + delta, fp32.

    Raises:
        MergeError: the result is not finite.
    """
    merged = target.to(dtype)
    tally = RetentionTally(path, dtype, weight=sum_squares(exact), delta=sum_squares(target - exact))
    tally.add_lost(target - merged)
    return merged, tally.compute_retention()


def check_foldable(model: nn.Module, layers: Iterable[tuple[str, SlotLayer]]) -> None:
    """Check that folding loses no delta, and changes no weight that another module shares.

    Raises:
        MergeError: a weight is quantized, offloaded, shared with another module, or not what its layer computes with.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for path, layer in layers:
        if is_quantized(layer.base_layer):
            raise MergeError(
                f"{path} is quantized; a delta would be lost in it",
                hint="merge into the 16-bit original, or keep the adapter beside this base",
            )
        adds_update = isinstance(layer, (LoraLinear, LoraConvolution))
        reason = reason_not_mergeable(unwrap_module(layer)) if adds_update else None
        if reason is not None:
            raise MergeError(
                f"{path} cannot be merged: {reason}",
                hint="remove its parametrization first, or keep the adapter beside this base",
            )
        for parameter in layer.base_layer.parameters():
            if parameter.is_meta:
                raise MergeError(
                    f"{path} is offloaded; a delta would be lost in it",
                    hint="load the whole model, or lk.merge(base, adapter, out), which reads the base from its files",
                )
            if owners[id(parameter)] > 1:
                raise MergeError(
                    f"the weight of {path} is shared with another module, which the merge would change too",
                    hint="untie them first (tie_word_embeddings=False, and a clone of the weight)",
                )


def weight_of(layer: SlotLayer) -> nn.Parameter:
    """Return the base weight that a layer's update belongs to."""
    if isinstance(layer, UpdatedWeightLayer):
        return layer.base_weight
    weight = unwrap_module(layer).weight
    assert isinstance(weight, nn.Parameter)
    return weight
