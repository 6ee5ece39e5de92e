"""Modules that adapters replace as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_kit.errors import RoutingError
from lora_kit.layers.routing import BASE_SLOT
from lora_kit.layers.slot_layer import SlotLayer


class SavedModule(SlotLayer):
    """A module that adapters replace as a whole (`modules_to_save`): a slab for each of its parameters and buffers.

    Trained in fp32; computed in the base module's dtype. Rows that use different copies are computed copy by copy: the
    module is a black box, and a head is a small part of a model.
    """

    def make_identity_stack(self, slots: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        def repeated(tensor: Tensor) -> Tensor:
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            return tensor.detach().to(self.device, kind).unsqueeze(0).repeat(slots, *[1] * tensor.ndim)

        return {name: repeated(tensor) for name, tensor in self.base_layer.state_dict().items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        routing = self.routing
        if routing.mixed:
            return self._call_rows(routing.rows, args, kwargs)
        if torch.compiler.is_compiling() and not self.trains:
            slot = routing.index(self.scaling)
            names = self.base_layer.state_dict()
            return self._call({name: self._slab(name).index_select(0, slot)[0] for name in names}, args, kwargs)
        return self._call_slot(routing.slot, args, kwargs)

    def _call_slot(self, slot: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entry = self.entries[slot]
        if entry is None:
            return self.base_layer(*args, **kwargs)
        return self._call(entry.tensors, args, kwargs)

    def _call(self, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = self.base_layer.state_dict(keep_vars=True)
        cast = {name: tensor.to(own[name].dtype) for name, tensor in tensors.items()}
        return torch.func.functional_call(self.base_layer, cast, args, kwargs)

    def _call_rows(self, rows: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise RoutingError("a saved module that takes more than one tensor cannot serve rows of different adapters")
        x = args[0]
        self.routing.index(x)  # checks the batch
        held = [slot if self.entries[slot] else BASE_SLOT for slot in rows]
        owner = torch.tensor(held).repeat_interleave(x.shape[0] // len(rows))
        order, parts = [], []
        for slot in sorted(set(held)):
            mine = (owner == slot).nonzero().squeeze(1).to(x.device)
            order.append(mine)
            parts.append(self._call_slot(slot, (x.index_select(0, mine),), {}))
        return torch.cat(parts).index_select(0, torch.cat(order).argsort())
