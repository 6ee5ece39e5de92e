"""Layers of the model that computes several adapters at once: what is frozen for all of them, the rest for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_kit.layers.initialization import lora_weights_of
from lora_kit.layers.linear import LoraLinear
from lora_kit.layers.row_spans import is_plain_lora
from lora_kit.layers.slot_entry import SlotEntry
from lora_kit.layers.slot_layer import SlotLayer
from lora_kit.ops.lora_spans import LoraSpan
from lora_kit.training.together.packed_rows import RowBlock, get_packed_rows


class JointLayer(nn.Module):
    """Something in the place of a layer, of which a model may read what the layer has (`weight.dtype`, `p`).

    Args:
        base_layer: what the model has in this place.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


class JointLinear(JointLayer):
    """A frozen linear layer, with the LoRA weights that the owner of each block has beside it.

    Args:
        base_layer: the frozen layer.
        wrapper: one of the owners' wrappers of the same layer, which knows how to compute it with spans.
    """

    def __init__(self, base_layer: nn.Module, wrapper: LoraLinear) -> None:
        super().__init__(base_layer)
        self.__dict__["wrapper"] = wrapper  # it is a part of another model

    def forward(self, x: Tensor) -> Tensor:
        rows = get_packed_rows()
        owners = zip(rows.iterate_spans(), rows.find_own(self), strict=True)
        spans = [span for (block, *ends), own in owners if (span := _find_span(block, own, *ends)) is not None]
        if not spans:
            return cast("Tensor", self.base_layer(x))
        wrapper: LoraLinear = self.__dict__["wrapper"]
        return wrapper.add_spans(x, (), {}, spans)


class SplitLayer(JointLayer):
    """A layer that the owner of each block computes for its own rows."""

    def forward(self, x: Tensor) -> Tensor:
        rows, outputs = get_packed_rows(), list[Tensor]()
        for block, own, part in zip(rows.blocks, rows.find_own(self), rows.split(x), strict=True):
            with block.stream.draw():
                outputs.append(own(part).flatten(0, 1))
        return torch.cat(outputs).unsqueeze(0)


def join_layers(body: nn.Module, owners: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Put a joint layer in the place of every layer that differs between owners, or draws random numbers.

    Args:
        body: of a model of its own that has the base's weights.
        owners: bodies of the models that blocks of rows may belong to.

    Returns:
        What was in these places, by path.
    """
    before: dict[str, nn.Module] = {}
    for path, layer in list(body.named_modules()):
        if any(path.startswith(f"{above}.") for above in before):
            continue
        own = [module for module in (owner.get_submodule(path) for owner in owners) if isinstance(module, SlotLayer)]
        if own or (isinstance(layer, nn.Dropout) and layer.p):
            body.set_submodule(path, _join_layer(layer, own))
            before[path] = layer
    return before


def _join_layer(layer: nn.Module, own: Sequence[SlotLayer]) -> nn.Module:
    """Return what takes the place of a layer that some owners have wrapped."""
    linear = [each for each in own if type(each) is LoraLinear and is_plain_lora(get_trained_entry(each))]
    return JointLinear(layer, linear[0]) if own and len(linear) == len(own) else SplitLayer(layer)


def get_trained_entry(layer: SlotLayer) -> SlotEntry:
    """Return what a layer holds of the one adapter that is trained on its model."""
    return next(entry for entry in layer.entries if entry is not None and entry.trainable)


def _find_span(block: RowBlock, own: nn.Module, start: int, end: int) -> LoraSpan | None:
    """Return the span of a block; None where its adapter does not cover the layer."""
    if not isinstance(own, LoraLinear):
        return None
    entry = get_trained_entry(own)
    (a, b), dropout = lora_weights_of(entry), entry.dropout if own.training else 0.0
    return LoraSpan(start, end, a, b, entry.scaling, dropout, block.stream.draw)
