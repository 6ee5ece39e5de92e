"""Convolutions with LoRA weights beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_kit.layers.initialization import A, B
from lora_kit.layers.introspect import unwrap_module
from lora_kit.layers.route import BASE_SLOT
from lora_kit.layers.row_split import forward_each_slot
from lora_kit.layers.slot_entry import SlotEntry
from lora_kit.layers.token_runs import RunRoute, check_runs
from lora_kit.layers.unstacked_layer import UpdatedWeightLayer
from lora_kit.ops.lora_functions import guard_backward

_CONVOLUTIONS: Final[dict[int, Callable[..., Tensor]]] = {3: functional.conv1d, 4: functional.conv2d}
"""By the number of dimensions of the weight."""


class LoraConvolution(UpdatedWeightLayer):
    """A convolution in one or two dimensions: base(x) + scaling · B * (A * x).

    A (r, in, k...) has the kernel, stride and padding of the base; B (out, r, 1...) mixes its outputs.
    """

    base_layer: nn.Conv1d | nn.Conv2d

    @property
    def base_weight(self) -> nn.Parameter:
        weight = unwrap_module(self).weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def compute_updated_weight(self, entry: SlotEntry, weight: Tensor) -> Tensor:
        product = entry.tensors[B].to(weight.dtype).flatten(1) @ entry.tensors[A].to(weight.dtype).flatten(1)
        return torch.add(weight, product.view(weight.shape), alpha=entry.scaling)

    def reason_no_runs(self) -> str | None:
        return "a convolution mixes the tokens of its kernel"

    def forward(self, x: Tensor) -> Tensor:
        route = self.routing.get_route()
        if isinstance(route, RunRoute):
            check_runs(self, route)
            return self._forward_slot(BASE_SLOT, (x,))
        if not route.mixed:
            return self._forward_slot(route.slot, (x,))
        y = forward_each_slot(self, route.rows, (x,), {}, self._forward_slot)
        assert isinstance(y, Tensor)
        return y

    def _forward_slot(self, slot: int, args: tuple[Tensor, ...]) -> Tensor:
        """Return base(x) + scaling · B * (A * x) with the A and B of one slot."""
        (x,) = args
        y: Tensor = self.call_base(x)
        entry = self.entries[slot]
        if entry is None:
            return y
        x = functional.dropout(x, entry.dropout, self.training)
        base, convolve = self.base_layer, _CONVOLUTIONS[self.base_layer.weight.ndim]
        h = convolve(x.to(y.dtype), entry.tensors[A].to(y.dtype), stride=base.stride, padding=base.padding)
        updated = torch.add(y, convolve(h, entry.tensors[B].to(y.dtype)), alpha=entry.scaling)
        guard_backward(updated, entry.list_read_as(y.dtype))
        return updated
