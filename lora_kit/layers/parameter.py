"""Pairs for a parameter of a module that is no linear layer: the fused experts of a mixture, the weight of a router."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_kit.errors import RoutingError
from lora_kit.layers.routing import Routing
from lora_kit.layers.slots import Entry, SlotLayer

A, B = "lora_A", "lora_B"


class LoraParameter(SlotLayer):
    """A module of which one parameter W has pairs: it computes with Wₑ + scaling · Bₑ Aₑ for every expert e.

    The pairs of all experts are stacked as PEFT stacks them for `target_parameters`: `lora_A` (E·r, in) expert by
    expert, `lora_B` (out, r·E) with the experts of one rank side by side. W is (E, out, in), or (E, in, out) where the
    module says `is_transposed`; a matrix (out, in) is one expert. Where several parameters of a module have pairs, one
    wrapper is around the other.

    What a slot holds stands alone: there is no slab to read by index, since the module takes one W for all its rows.
    Rows of different adapters are computed adapter by adapter.
    """

    def __init__(self, base_layer: nn.Module, parameter: str, routing: Routing) -> None:
        super().__init__(base_layer, routing)
        self.parameter = parameter

    def neutral(self, slots: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        return {}

    def _place(self, name: str, slot: int, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, self.dtype, copy=True)

    def _tie(self, *, copy: bool) -> None:
        if not copy:  # on another device; room for more slots concerns nobody who stands alone
            super()._tie(copy=copy)

    @property
    def own(self) -> nn.Parameter:
        """W, in the innermost module."""
        module = self.base_layer
        while isinstance(module, SlotLayer):
            module = module.base_layer
        weight = module._parameters[self.parameter]
        assert weight is not None
        return weight

    def changed(self, entry: Entry, weight: Tensor) -> Tensor:
        """W with an update, in the dtype of the weight given, which is W in some dtype."""
        count = weight.shape[0] if weight.ndim == 3 else 1
        a, b = entry.tensors[A].to(weight.dtype), entry.tensors[B].to(weight.dtype)
        each_a = a.reshape(count, -1, a.shape[-1])  # (E, r, in)
        each_b = b.reshape(b.shape[0], -1, count).permute(2, 0, 1)  # (E, out, r)
        left, right = (each_a.mT, each_b.mT) if self._is_transposed(weight) else (each_b, each_a)
        stacked = weight if weight.ndim == 3 else weight.unsqueeze(0)
        return torch.baddbmm(stacked, left, right, alpha=entry.scaling).view(weight.shape)

    def _is_transposed(self, weight: Tensor) -> bool:
        return weight.ndim == 3 and is_transposed(self.base_layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.routing.mixed:
            return self._by_rows(args, kwargs)
        entry = self.entries[self.routing.slot]
        if entry is None:
            return self.base_layer(*args, **kwargs)
        inner = "base_layer." * _depth(self.base_layer) + self.parameter
        changed = {inner: self.changed(entry, self.own)}
        return torch.func.functional_call(self.base_layer, changed, args, kwargs)

    def _by_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Each adapter's rows through the module by themselves."""
        if kwargs or not args or not all(isinstance(x, Tensor) and x.shape[:1] == args[0].shape[:1] for x in args):
            raise RoutingError(
                f"a {type(self.base_layer).__name__} that takes more than tensors of tokens cannot serve rows of "
                "different adapters",
                hint="use() one adapter at a time",
            )
        routing = self.routing
        routing.check(args[0])
        rows = routing.rows
        owner = torch.tensor(rows, device=args[0].device).repeat_interleave(args[0].shape[0] // len(rows))
        parts, order = [], []
        for slot in sorted(set(rows)):
            mine = (owner == slot).nonzero().squeeze(1)
            with routing.alone(slot):
                parts.append(self(*(x.index_select(0, mine) for x in args)))
            order.append(mine)
        return _joined(parts, torch.cat(order).argsort())


def is_transposed(module: nn.Module) -> bool:
    """Whether a module of experts keeps its weights as (E, in, out)."""
    return bool(getattr(module, "is_transposed", False))


def _depth(module: nn.Module) -> int:
    """Wrappers around the innermost module."""
    return 1 + _depth(module.base_layer) if isinstance(module, SlotLayer) else 0


def _joined(parts: Sequence[Any], back: Tensor) -> Any:
    """The outputs of parts of a batch in the order of the whole: tensors, or tuples of tensors."""
    if isinstance(parts[0], tuple):
        return tuple(_joined(each, back) for each in zip(*parts, strict=True))
    return torch.cat(list(parts)).index_select(0, back)
