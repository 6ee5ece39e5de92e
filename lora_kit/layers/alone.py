"""Layers whose pairs stand alone: fused experts and other parameters, and convolutions.

There is no slab to read by index, since such a layer takes one weight for all its rows: rows of different adapters are
computed adapter by adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_kit.errors import RoutingError
from lora_kit.layers.pairs import A, B
from lora_kit.layers.routing import Routing
from lora_kit.layers.slots import Entry, SlotLayer

_CONVOLVE: Final[dict[int, Callable[..., Tensor]]] = {3: functional.conv1d, 4: functional.conv2d}
"""By the dimensions of the weight."""


class AloneLayer(SlotLayer):
    """A layer without slabs. Subclasses say what weight it changes, and how, and use it in `forward`."""

    def neutral(self, slots: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        return {}

    def _place(self, name: str, slot: int, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, self.dtype, copy=True)

    def _tie(self, *, copy: bool) -> None:
        if not copy:  # on another device; room for more slots concerns nobody who stands alone
            super()._tie(copy=copy)

    @property
    def own(self) -> nn.Parameter:
        """The base weight that is changed."""
        raise NotImplementedError

    def changed(self, entry: Entry, weight: Tensor) -> Tensor:
        """The weight with an update, in the dtype of the weight given, which is the base's in some dtype."""
        raise NotImplementedError

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


class LoraParameter(AloneLayer):
    """A module of which one parameter W has pairs: it computes with Wₑ + scaling · Bₑ Aₑ for every expert e.

    The pairs of all experts are stacked as PEFT stacks them for `target_parameters`: `lora_A` (E·r, in) expert by
    expert, `lora_B` (out, r·E) with the experts of one rank side by side. W is (E, out, in), or (E, in, out) where the
    module says `is_transposed`; a matrix (out, in) is one expert. Where several parameters of a module have pairs, one
    wrapper is around the other.
    """

    def __init__(self, base_layer: nn.Module, parameter: str, routing: Routing) -> None:
        super().__init__(base_layer, routing)
        self.parameter = parameter

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


class LoraConvolution(AloneLayer):
    """A convolution in one or two dimensions: base(x) + scaling · B * (A * x).

    A (r, in, k...) has the kernel, stride and padding of the base; B (out, r, 1...) mixes its outputs.
    """

    @property
    def own(self) -> nn.Parameter:
        weight = self.base_layer.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def changed(self, entry: Entry, weight: Tensor) -> Tensor:
        product = entry.tensors[B].to(weight.dtype).flatten(1) @ entry.tensors[A].to(weight.dtype).flatten(1)
        return torch.add(weight, product.view(weight.shape), alpha=entry.scaling)

    def forward(self, x: Tensor) -> Tensor:
        if self.routing.mixed:
            found: Tensor = self._by_rows((x,), {})
            return found
        y: Tensor = self.base_layer(x)
        entry = self.entries[self.routing.slot]
        if entry is None:
            return y
        x = functional.dropout(x, entry.dropout, self.training)
        base: Any = self.base_layer
        convolve = _CONVOLVE[base.weight.ndim]
        h = convolve(x.to(y.dtype), entry.tensors[A].to(y.dtype), stride=base.stride, padding=base.padding)
        return torch.add(y, convolve(h, entry.tensors[B].to(y.dtype)), alpha=entry.scaling)


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
