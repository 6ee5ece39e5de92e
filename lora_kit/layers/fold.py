"""Fold one slot of a layer into its base weight: accumulate in fp32, round once, and measure what survived."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_kit.errors import MergeError
from lora_kit.layers.initialization import MAGNITUDE, lora_weights_of
from lora_kit.layers.introspect import is_quantized, is_stored_transposed
from lora_kit.layers.linear import LoraLinear
from lora_kit.layers.slot_layer import SlotLayer
from lora_kit.layers.unstacked_layer import UpdatedWeightLayer


@dataclass(frozen=True)
class Retention:
    """How much of one layer's delta survived when it was folded into a weight.

    Attributes:
        path: of the layer.
        relative: norm of the delta over the norm of the weight.
        retained: 1 - |(merged - weight) - delta| / |delta|: the share that survived rounding to the weight's dtype.
    """

    path: str
    relative: float
    retained: float


@torch.no_grad()
def fold_slot(path: str, layer: SlotLayer, slot: int) -> tuple[Tensor, Retention]:
    """Return weight + scaling · B A (rescaled by row for a DoRA), in the weight's own dtype and layout.

    Raises:
        MergeError: the result is not finite.
    """
    entry = layer.entries[slot]
    assert entry is not None
    weight = weight_of(layer)
    if isinstance(layer, UpdatedWeightLayer):
        return round_to_dtype(path, weight.float(), layer.compute_updated_weight(entry, weight.float()), weight.dtype)
    exact = weight.T.float() if is_stored_transposed(layer.base_layer) else weight.float()
    a, b = lora_weights_of(entry)
    target = exact + (b.float() @ a.float()).mul_(entry.scaling)
    if MAGNITUDE in entry.tensors:
        assert isinstance(layer, LoraLinear)
        target *= layer.compute_dora_scale(entry).unsqueeze(1)
    merged, retention = round_to_dtype(path, exact, target, weight.dtype)
    return (merged.T.contiguous() if is_stored_transposed(layer.base_layer) else merged), retention


def round_to_dtype(path: str, exact: Tensor, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Retention]:
    """Round a changed weight to its dtype, and measure how much of the change survives that.

    Args:
        exact: the weight before, fp32.
        target: the weight after, fp32.

    Raises:
        MergeError: the result is not finite.
    """
    merged = target.to(dtype)
    if not torch.isfinite(merged).all():
        raise MergeError(f"{path}: the merged weight is not finite in {dtype}")
    delta = target - exact
    norm = delta.norm()
    lost = (merged.float() - exact - delta).norm()
    retained = max(0.0, float(1 - lost / norm)) if norm else 1.0
    return merged, Retention(path, float(norm / exact.norm()), retained)


def check_foldable(model: nn.Module, layers: Iterable[tuple[str, SlotLayer]]) -> None:
    """Refuse to fold into weights that would lose the delta, or that another module shares.

    Raises:
        MergeError: a weight is quantized, or shared with another module.
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
        for parameter in layer.base_layer.parameters():
            if owners[id(parameter)] > 1:
                raise MergeError(
                    f"the weight of {path} is shared with another module, which the merge would change too",
                    hint="untie them first (tie_word_embeddings=False, and a clone of the weight)",
                )


def weight_of(layer: SlotLayer) -> nn.Parameter:
    """Return the base weight that a layer's update belongs to."""
    if isinstance(layer, UpdatedWeightLayer):
        return layer.base_weight
    weight = layer.base_layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight
