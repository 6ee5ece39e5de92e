"""Layers around parameters that another library made. These stay the same objects in the same memory.

An optimizer that trains such parameters already keeps moments beside them, element by element in their memory order. In
other memory, or in another order, the two would no longer belong together. So nothing is stacked; what needs stacked
weights stacks them anew.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_kit.errors import RoutingError
from lora_kit.layers.conv import LoraConvolution
from lora_kit.layers.embedding import LoraEmbedding
from lora_kit.layers.initialization import MAGNITUDE, A, B
from lora_kit.layers.linear import LoraLinear
from lora_kit.layers.parameter import LoraParameter
from lora_kit.layers.route import Route
from lora_kit.layers.saved_module import SavedModule
from lora_kit.layers.slot_entry import SlotEntry, leaf_name
from lora_kit.layers.token_runs import RunRoute
from lora_kit.layers.unstacked_layer import UnstackedLayer


class AdoptedLayer(UnstackedLayer):
    """A layer whose slots hold parameters that another library made."""

    def adopt(self, slot: int, tensors: Mapping[str, nn.Parameter], scaling: float, dropout: float) -> None:
        """Let a slot hold these very parameters, trainable where they require grad."""
        self.routing.discard_caches()
        for name, tensor in tensors.items():
            # `register_parameter` rejects names that a wrapper inside this one has as well.
            self._parameters[leaf_name(name, slot)] = tensor
        self.entries[slot] = SlotEntry(dict(tensors), scaling, dropout)
        self.scaling[slot] = scaling
        self.refresh_trainable()

    def refresh_trainable(self) -> None:
        """Update which slots are trainable, after `requires_grad` of their parameters was changed."""
        for entry in self.entries:
            if entry is not None:
                entry.trainable = any(tensor.requires_grad for tensor in entry.tensors.values())
        self.trains = any(entry is not None and entry.trainable for entry in self.entries)

    def _get_memory(self, stacked: Mapping[str, Tensor], name: str, slot: int, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, copy=True)  # in its own dtype, which the optimizer goes by

    def _get_stacks(self, *names: str) -> list[Tensor]:
        """Stack every slot's tensor, padded to the highest rank, in fp32; differentiable."""
        # The class after UnstackedLayer knows the shapes of its stacked weights.
        identities = super(UnstackedLayer, self).make_identity_stack(1, self.rank, torch.float32)
        return [self._stack_slots(name, identities[name][0]) for name in names]

    def _stack_slots(self, name: str, identity: Tensor) -> Tensor:
        tensors = [entry.tensors.get(name) if entry else None for entry in self.entries]
        return torch.stack([identity if tensor is None else _pad_like(tensor, identity) for tensor in tensors])


class AdoptedLinear(AdoptedLayer, LoraLinear):
    """A linear layer with adopted LoRA weights."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        route = self.routing.get_route()
        if isinstance(route, RunRoute):
            return super().forward(x, *args, **kwargs)
        entry = None if route.mixed or not self.training else self._get_entry(route)
        if entry is None or not _has_dora_dropout(entry):
            return super().forward(x, *args, **kwargs)
        # y + (c - 1) W drop(x) + c s B A drop(x): PEFT drops the input of the base's share of the change as well.
        y: Tensor = self.call_base(x, *args, **kwargs)
        dropped = functional.dropout(x, entry.dropout).to(y.dtype)
        update = dropped @ entry.tensors[A].to(y.dtype).mT @ entry.tensors[B].to(y.dtype).mT
        base = functional.linear(dropped, self.weight_matrix().to(y.dtype))
        scale = self.compute_dora_scale(entry)
        return (y + (scale - 1) * base + scale * entry.scaling * update).to(y.dtype)

    def _forward_rows(self, route: Route, y: Tensor, x: Tensor) -> Tensor:
        entries = [self.entries[slot] for slot in route.rows] if self.training else []
        if any(entry is not None and _has_dora_dropout(entry) for entry in entries):
            raise RoutingError(
                "rows of adopted adapters that are DoRA with dropout cannot be trained together",
                hint="use() one adapter at a time",
            )
        return super()._forward_rows(route, y, x)

    def _can_gather(self, y: Tensor, x: Tensor) -> bool:
        return False

    def refresh_trainable(self) -> None:
        super().refresh_trainable()
        self._refresh_dora_scales()  # of adapters that are no longer trained, or were loaded anew


class AdoptedEmbedding(AdoptedLayer, LoraEmbedding):
    """An embedding with adopted LoRA weights."""


class AdoptedModule(AdoptedLayer, SavedModule):
    """A module with adopted copies in its place."""


class AdoptedParameter(AdoptedLayer, LoraParameter):
    """Fused experts, or another module, with adopted LoRA weights of one parameter."""


class AdoptedConvolution(AdoptedLayer, LoraConvolution):
    """A convolution with adopted LoRA weights."""


def _has_dora_dropout(entry: SlotEntry) -> bool:
    return MAGNITUDE in entry.tensors and entry.dropout > 0


def _pad_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor with zeros after its entries along each axis, in the shape and dtype of another."""
    missing = [size - have for size, have in zip(like.shape, tensor.shape, strict=True)]
    padding = [number for size in reversed(missing) for number in (0, size)]
    return functional.pad(tensor.to(like.dtype), padding) if any(missing) else tensor.to(like.dtype)
