"""Modules that adapters replace as a whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_kit.layers.route import BASE_SLOT
from lora_kit.layers.row_split import forward_each_slot
from lora_kit.layers.slot_entry import SlotEntry
from lora_kit.layers.slot_layer import SlotLayer
from lora_kit.layers.token_runs import RunRoute, forward_tokens, reason_not_tokenwise
from lora_kit.ops.lora_functions import guard_backward


class SavedModule(SlotLayer):
    """A module that adapters replace as a whole (`modules_to_save`): each of its parameters and buffers is stacked.

    Trained in fp32; computed in the base module's dtype. Rows that use different copies are computed copy by copy: the
    module is a black box, and a head is a small part of a model.
    """

    def make_identity_stack(self, slots: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        def repeat(tensor: Tensor) -> Tensor:
            stack_dtype = dtype if tensor.is_floating_point() else tensor.dtype
            return tensor.detach().to(self.device, stack_dtype).unsqueeze(0).repeat(slots, *[1] * tensor.ndim)

        return {name: repeat(tensor) for name, tensor in self.base_layer.state_dict().items()}

    def reason_no_runs(self) -> str | None:
        return reason_not_tokenwise(self.base_layer)

    def _find_entry(self, slot: int, name: str) -> SlotEntry | None:
        entry = self.entries[slot]
        return entry if entry is not None and name in entry.tensors else None

    def _compute_read_tensor(self, entry: SlotEntry, name: str, base: Tensor) -> Tensor:
        return entry.tensors[name].to(base.dtype)

    def forward(self, *args: object, **kwargs: object) -> object:
        route = self.routing.get_route()
        if isinstance(route, RunRoute):
            if not any(self.entries[slot] for slot in route.slots):
                return self.call_base(*args, **kwargs)
            (x,) = args  # a single layer is given one tensor
            assert isinstance(x, Tensor)
            return forward_tokens(self, route, x)
        if route.mixed:
            slots = [slot if self.entries[slot] else BASE_SLOT for slot in route.rows]
            if len(set(slots)) > 1:
                return forward_each_slot(self, slots, args, kwargs, lambda slot, x: self._call_slot(slot, x, {}))
            return self._call_slot(slots[0], args, kwargs)
        if torch.compiler.is_compiling() and not self.trains:
            index = self.routing.get_index(route, self.scaling)
            names = list(self.base_layer.state_dict())
            stacks = zip(names, self._get_stacks(*names), strict=True)
            return self._call({name: stacked.index_select(0, index)[0] for name, stacked in stacks}, args, kwargs)
        return self._call_slot(route.slot, args, kwargs)

    def _call_slot(self, slot: int, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        entry = self.entries[slot]
        with self.lock_module():
            return self._call(entry.tensors if entry else {}, args, kwargs)

    def _call(self, tensors: Mapping[str, Tensor], args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        if not tensors:
            return self.call_base(*args, **kwargs)
        base = self.base_layer.state_dict(keep_vars=True)
        cast = {name: tensor.to(base[name].dtype) for name, tensor in tensors.items()}
        output: object = torch.func.functional_call(self.base_layer, cast, args, kwargs)
        guard_backward(output, [tensor for name, tensor in tensors.items() if cast[name] is tensor])
        return output
