"""SlotLayer: a frozen base layer with the weights of every adapter beside it, and how adapters enter and leave slots.

The **stacked weights** of a layer are one tensor for each name that adapters bring (`lora_A`, `lora_B`, ...). The first
axis is the slot: `lora_A` is (slots, r, in). An adapter of a lower rank fills a part of its slot; the rest is zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Final

import torch
from torch import Tensor, nn

from lora_kit.errors import BankError, RoutingError
from lora_kit.layers.offloaded_weights import offload_device_of
from lora_kit.layers.route_stack import find_module_call
from lora_kit.layers.routing import Routing, is_captured
from lora_kit.layers.slot_entry import CONSTANT_PREFIX, SlotEntry, leaf_name, narrow_to, stack_leaves
from lora_kit.ops.lora_functions import guard_backward

_INNER: Final = "base_layer."
"""What nn.Module puts before the names of a base layer's tensors."""
_READ_NAMES: Final = ("weight", "bias")
_ACCELERATE_NAMES: Final = frozenset({"_hf_hook", "_old_forward"})
"""Attributes by which accelerate marks a module that it moves or offloads."""


class SlotLayer(nn.Module):
    """A frozen base layer and its stacked weights. Subclasses define which there are, and use them in `forward`.

    An attribute that this module does not have is read from the base layer (T5 reads `wo.weight.dtype`).

    Attributes:
        base_layer: the wrapped module.
        routing: which slot each row uses; shared by all layers of a bank.
        device: on which the base layer computes, and of everything here.
        dtype: of the stacked weights.
        rank: that the stacked weights have capacity for.
        stacked_weights: by name, each (slots, ...).
        scaling: (slots,) fp32.
        entries: what each slot holds; None for a free slot.
        trains: whether any slot is trainable.
        is_read_directly: whether some module of the model computes with this layer's weight, and does not always call
            the layer; None while that is not known.
    """

    def __init__(self, base_layer: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.base_layer = base_layer
        # In __dict__ it is found at once; nn.Module would search three dictionaries in every forward.
        self.__dict__["base_layer"] = base_layer
        self.routing = routing
        self.device = compute_device_of(base_layer)
        self.dtype = torch.float32
        self.rank = 0
        self.stacked_weights: dict[str, Tensor] = {}
        self.scaling = torch.zeros(0, device=self.device)
        self.entries: list[SlotEntry | None] = []
        self.trains = False
        self.is_read_directly: bool | None = None
        routing.prepare(self.device)
        self.train(base_layer.training)
        self.register_load_state_dict_post_hook(_finish_loading)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base_layer = self.__dict__.get("_modules", {}).get("base_layer")
            if base_layer is None or name in _ACCELERATE_NAMES:
                raise
            if self.is_read_directly and name in _READ_NAMES:
                return self._read_tensor(name, in_call=torch.compiler.is_compiling())
            return getattr(base_layer, name)

    @torch._disable_dynamo  # torch.compiler.disable imports the compiler at once
    def _read_tensor(self, name: str, *, in_call: bool) -> Tensor | None:
        """Return a tensor of the base layer that a module of the model reads, as the caller's adapter changes it.

        It is what the merged model would have there, without dropout. Outside any call of a module it is the base's.

        Raises:
            RoutingError: rows differ, or the weight is not made of floats.
        """
        base: Tensor | None = getattr(self.base_layer, name)
        route = self.routing.get_route()
        entries = [entry for slot in route.slots if (entry := self._find_entry(slot, name)) is not None]
        if base is None or not entries or not (in_call or find_module_call()):
            return base
        if len(route.slots) > 1 or not base.is_floating_point():
            problem = "rows of different adapters do" if len(route.slots) > 1 else "a quantized weight does"
            kind = type(_find_base(self)).__name__
            raise RoutingError(
                f"a module reads the {name} of a {kind} and does not call it, which {problem} not allow",
                hint="use() one adapter at a time, on a base that is not quantized",
            )
        return self._compute_read_tensor(entries[0], name, base)

    def _find_entry(self, slot: int, name: str) -> SlotEntry | None:
        """Return what a slot holds for a tensor of this layer."""
        return self.entries[slot] if name == "weight" else None

    def _compute_read_tensor(self, entry: SlotEntry, name: str, base: Tensor) -> Tensor:
        return self.compute_updated_weight(entry, base)

    def compute_updated_weight(self, entry: SlotEntry, weight: Tensor) -> Tensor:
        """Return a weight with the update of an entry; differentiable.

        Args:
            weight: the base weight, in any floating-point dtype.

        Returns:
            of the shape and dtype of the weight given.
        """
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of this module; a weight that the base layer has, there (`model.tie_weights()` does so)."""
        if name in _ACCELERATE_NAMES:
            raise BankError(
                "accelerate cannot move or offload the layers of a model with a bank",
                hint="offload or dispatch the model first, then attach; or detach the bank first",
            )
        base = _find_base(self)
        owner = next((own for own in (base._parameters, base._buffers) if name in own), None) if base else None
        if owner is None:
            super().__setattr__(name, value)
        else:
            owner[name] = value  # also a plain tensor, which torch.func.functional_call puts there for a while
            self.refresh_from_base()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base layer's own, so that a model with a bank has the base's. Arguments: as nn.Module's."""
        return self.base_layer.state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Hand the base layer's tensors on under the names by which nn.Module then looks for them in this one."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}{_INNER}{key.removeprefix(prefix)}"] = state_dict.pop(key)
        self.__dict__["_load_messages"] = prefix, (missing_keys, unexpected_keys, error_msgs)

    def make_identity_stack(self, slots: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Make stacked weights with which every slot leaves the base's output unchanged.

        Returns:
            by name, each (slots, ...); of the dtype where it is floating-point.
        """
        raise NotImplementedError

    def _get_memory(self, stacked: Mapping[str, Tensor], name: str, slot: int, tensor: Tensor) -> Tensor:
        """Return the memory in which a slot keeps a tensor: its part of stacked weights, or memory of its own."""
        if name not in stacked:
            return tensor.detach().to(self.device, torch.float32, copy=True)
        return narrow_to(stacked[name][slot], tensor.shape)

    def reason_no_runs(self) -> str | None:
        """Return why a packed forward cannot give runs of tokens to different adapters here; None where it can."""
        return None

    def reserve(self, slots: int, rank: int, dtype: torch.dtype) -> None:
        """Allocate capacity for so many slots of this rank. Values stay, and leaf parameters stay the same objects."""
        has_slots = len(self.entries)
        if slots <= has_slots and rank <= self.rank:
            return
        slots, rank = max(slots, has_slots), max(rank, self.rank)
        stacked = self.make_identity_stack(slots, rank, dtype)
        self.dtype, self.rank = dtype, rank
        scaling = torch.zeros(slots, device=self.device)
        with torch.no_grad():
            scaling[:has_slots] = self.scaling
            self._rebind_entries(stacked, copy=True)
        # In one assignment, after the values are there: other threads may compute meanwhile.
        self.stacked_weights, self.scaling = stacked, scaling
        self.entries += [None] * (slots - has_slots)
        self.routing.discard_caches()

    def is_recorded(self) -> bool:
        """Return whether this forward is compiled, or captured into a CUDA graph, to run again with another routing."""
        return torch.compiler.is_compiling() or is_captured(self.device)

    def call_base(self, *args: object, **kwargs: object) -> Any:
        """Return what the base layer computes. A backward is rejected after a merge into it."""
        output = self.base_layer(*args, **kwargs)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            guard_backward(output, self.base_layer.parameters())
        return output

    def lock_module(self) -> contextlib.AbstractContextManager[object]:
        """Return a lock for a call of the base layer as a black box: other weights are put into it meanwhile.

        Compiled code puts none into it, and cannot take locks.
        """
        return contextlib.nullcontext() if torch.compiler.is_compiling() else self.routing.module_lock

    def _replicate_for_data_parallel(self) -> SlotLayer:
        raise BankError(
            "nn.DataParallel copies the model into threads that have no bank", hint="use DistributedDataParallel"
        )

    def put(self, slot: int, tensors: Mapping[str, Tensor], scaling: float) -> None:
        """Copy an adapter's tensors into a slot."""
        self.routing.discard_caches()
        stacked = self.stacked_weights
        own = {name: self._get_memory(stacked, name, slot, tensor) for name, tensor in tensors.items()}
        # Before the copy: if that fails, `clear` finds the entry and resets the slot.
        self.entries[slot] = SlotEntry(own, scaling)
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
            self.scaling[slot] = scaling

    def make_trainable(self, slot: int, dropout: float) -> list[nn.Parameter]:
        """Turn what a slot holds into leaf parameters that share the memory of the stacked weights; return them."""
        entry = self.entries[slot]
        assert entry is not None
        leaves = []
        for name, view in entry.tensors.items():
            if view.is_floating_point() and not name.startswith(CONSTANT_PREFIX):
                leaf = nn.Parameter(view)
                # `register_parameter` rejects names that a wrapper inside this one has as well.
                self._parameters[leaf_name(name, slot)] = leaf
                entry.tensors[name] = leaf
                leaves.append(leaf)
        entry.dropout = dropout
        entry.trainable = self.trains = True
        return leaves

    def clear(self, slot: int) -> None:
        """Remove an adapter from a slot: its leaf parameters are dropped and the slot changes no output."""
        entry = self.entries[slot]
        if entry is None:
            return
        for name, tensor in entry.tensors.items():
            self._parameters.pop(leaf_name(name, slot), None)
            if isinstance(tensor, nn.Parameter):
                tensor.data = tensor.data.clone()  # a backward still to come reads it; the slot's memory is reset
        self.routing.discard_caches()
        self.entries[slot] = None
        if entry.trainable:
            self.trains = any(e is not None and e.trainable for e in self.entries)
        self._reset_slots([slot])

    def refresh_from_base(self) -> None:
        """Recompute what was derived from the base's weights."""
        self._reset_slots([slot for slot, entry in enumerate(self.entries) if entry is None])

    def _reset_slots(self, slots: Sequence[int]) -> None:
        with torch.no_grad():
            values = self.make_identity_stack(1, self.rank, self.dtype)
            for slot in slots:
                for name, value in values.items():
                    self.stacked_weights[name][slot].copy_(value[0])
                self.scaling[slot] = 0

    def _rebind_entries(self, stacked: Mapping[str, Tensor], *, copy: bool) -> None:
        """Point every entry at these stacked weights; with `copy`, copy its values there first."""
        for slot, entry in enumerate(self.entries):
            if entry is None:
                continue
            for name, tensor in entry.tensors.items():
                memory = self._get_memory(stacked, name, slot, tensor)
                if copy:
                    memory.copy_(tensor)
                if isinstance(tensor, nn.Parameter):
                    tensor.data = memory
                else:
                    entry.tensors[name] = memory

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SlotLayer:
        """Follow the model to another device. Dtypes stay: fp32 masters survive `model.bfloat16()`."""
        leaves, self._parameters = self._parameters, {}
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters = leaves
        device = fn(torch.empty(0, device=self.device)).device
        if device != self.device:
            self._move_to(device)
        return self

    def _move_to(self, device: torch.device) -> None:
        """Move the weights of every slot, and the gradients of the trainable ones."""
        leaves = [leaf for leaf in self._parameters.values() if leaf is not None]
        self.device = device
        self.routing.discard_caches()
        self.stacked_weights = {name: stacked.to(device) for name, stacked in self.stacked_weights.items()}
        self.scaling = self.scaling.to(device)
        self.routing.prepare(device)
        gradients = [None if leaf.grad is None else leaf.grad.to(device) for leaf in leaves]
        self._rebind_entries(self.stacked_weights, copy=False)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient

    def _get_stacks(self, *names: str) -> list[Tensor]:
        """Return stacked weights by name, differentiable with respect to the leaf parameters in them.

        They are of one size, also where another thread puts larger ones in their place meanwhile.
        """
        stacked = self.stacked_weights
        if not (self.trains and torch.is_grad_enabled()):
            return [stacked[name] for name in names]
        return [self._connect_leaves(name, stacked[name]) for name in names]

    def _connect_leaves(self, name: str, stacked: Tensor) -> Tensor:
        """Return stacked weights as a function of the leaf parameters in their memory."""
        leaves = [
            (slot, e.tensors[name]) for slot, e in enumerate(self.entries) if e and e.trainable and name in e.tensors
        ]
        slots, tensors = [slot for slot, _ in leaves], [leaf for _, leaf in leaves]
        return stack_leaves(stacked, slots, tensors)


def _find_base(layer: nn.Module) -> nn.Module | None:
    """Return the model's own module inside a wrapper; None while the wrapper is made."""
    module: nn.Module | None = layer
    while isinstance(module, SlotLayer):
        module = module.__dict__.get("base_layer")
    return module


def _finish_loading(layer: nn.Module, _: object) -> None:
    """Name what did not match by the base's names, and follow the base's new weights."""
    assert isinstance(layer, SlotLayer)
    prefix, messages = layer.__dict__.pop("_load_messages")
    for lines in messages:
        lines[:] = [line.replace(prefix + _INNER, prefix) for line in lines]
    layer.refresh_from_base()


def compute_device_of(module: nn.Module) -> torch.device:
    """Return the device on which a module computes: of an offloaded one, that to which its weights are loaded."""
    if isinstance(module, SlotLayer):
        return module.device
    tensors = chain(module.parameters(), module.buffers())
    return offload_device_of(module) or next((tensor.device for tensor in tensors), torch.device("cpu"))
