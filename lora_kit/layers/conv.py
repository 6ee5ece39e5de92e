"""Convolutions with LoRA weights beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_kit.layers.initialization import A, B
from lora_kit.layers.parameter import UnstackedLayer
from lora_kit.layers.slot_layer import SlotEntry

_CONVOLUTIONS: Final[dict[int, Callable[..., Tensor]]] = {3: functional.conv1d, 4: functional.conv2d}
"""By the dimensions of the weight."""


class LoraConvolution(UnstackedLayer):
    """A convolution in one or two dimensions: base(x) + scaling · B * (A * x).

    A (r, in, k...) has the kernel, stride and padding of the base; B (out, r, 1...) mixes its outputs.
    """

    @property
    def base_weight(self) -> nn.Parameter:
        weight = self.base_layer.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def changed(self, entry: SlotEntry, weight: Tensor) -> Tensor:
        product = entry.tensors[B].to(weight.dtype).flatten(1) @ entry.tensors[A].to(weight.dtype).flatten(1)
        return torch.add(weight, product.view(weight.shape), alpha=entry.scaling)

    def forward(self, x: Tensor) -> Tensor:
        if self.routing.mixed:
            found: Tensor = self._forward_by_adapter((x,), {})
            return found
        y: Tensor = self.base_layer(x)
        entry = self.entries[self.routing.slot]
        if entry is None:
            return y
        x = functional.dropout(x, entry.dropout, self.training)
        base: Any = self.base_layer
        convolve = _CONVOLUTIONS[base.weight.ndim]
        h = convolve(x.to(y.dtype), entry.tensors[A].to(y.dtype), stride=base.stride, padding=base.padding)
        return torch.add(y, convolve(h, entry.tensors[B].to(y.dtype)), alpha=entry.scaling)
