"""Layers whose LoRA weights are not stacked: fused experts and other parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_kit.errors import RoutingError
from lora_kit.layers.experts import EXPERT_MATRICES, ExpertFactors, forward_experts, is_fused_experts, is_unmodified
from lora_kit.layers.initialization import A, B
from lora_kit.layers.introspect import unwrap_module
from lora_kit.layers.routing import Routing
from lora_kit.layers.slot_layer import SlotEntry, SlotLayer
from lora_kit.ops.grouped_mm import round_up_rank


class UnstackedLayer(SlotLayer):
    """A layer without slabs. Subclasses say what weight it changes, and how, and use it in `forward`."""

    def make_identity_stack(self, slots: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        return {}

    def _place(self, name: str, slot: int, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, self.dtype, copy=True)

    def _rebind_entries(self, *, copy: bool) -> None:
        if not copy:  # on another device; room for more slots concerns nobody who stands alone
            super()._rebind_entries(copy=copy)

    @property
    def base_weight(self) -> nn.Parameter:
        """The base weight that is changed."""
        raise NotImplementedError

    def changed(self, entry: SlotEntry, weight: Tensor) -> Tensor:
        """The weight with an update, in the dtype of the weight given, which is the base's in some dtype."""
        raise NotImplementedError

    def _forward_by_adapter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
        return _join_outputs(parts, torch.cat(order).argsort())


class LoraParameter(UnstackedLayer):
    """A module of which one parameter W has pairs: it computes with Wₑ + scaling · Bₑ Aₑ for every expert e.

    The pairs of all experts are stacked as PEFT stacks them for `target_parameters`: `lora_A` (E·r, in) expert by
    expert, `lora_B` (out, r·E) with the experts of one rank side by side. W is (E, out, in), or (E, in, out) where the
    module says `is_transposed`; a matrix (out, in) is one expert. Where several parameters of a module have pairs, one
    wrapper is around the other.

    Experts that say how they compute are computed in rank space, by the outermost wrapper for all. Other modules are
    black boxes, which are given the sum instead of W.
    """

    def __init__(self, base_layer: nn.Module, parameter: str, routing: Routing) -> None:
        super().__init__(base_layer, routing)
        self.parameter = parameter

    @property
    def base_weight(self) -> nn.Parameter:
        """W, in the innermost module."""
        weight = unwrap_module(self)._parameters[self.parameter]
        assert weight is not None
        return weight

    def _list_chain(self) -> list[nn.Module]:
        """This wrapper, those inside it, and the innermost module."""
        chain: list[nn.Module] = [self]
        while isinstance(chain[-1], SlotLayer):
            chain.append(chain[-1].base_layer)
        return chain

    def changed(self, entry: SlotEntry, weight: Tensor) -> Tensor:
        each_a, each_b = self._split_by_expert(entry)
        each_a, each_b = each_a.to(weight.dtype), each_b.to(weight.dtype)
        left, right = (each_a.mT, each_b.mT) if self._is_transposed(weight) else (each_b, each_a)
        stacked = weight if weight.ndim == 3 else weight.unsqueeze(0)
        # Autocast would change the dtype of the sum, which is the module's to choose.
        with torch.autocast(weight.device.type, enabled=False):
            return torch.baddbmm(stacked, left, right, alpha=entry.scaling).view(weight.shape)

    def _split_by_expert(self, entry: SlotEntry) -> tuple[Tensor, Tensor]:
        """A as (E, r, in), B as (E, out, r)."""
        a, b = entry.tensors[A], entry.tensors[B]
        count = self.base_weight.shape[0] if self.base_weight.ndim == 3 else 1
        return a.reshape(count, -1, a.shape[-1]), b.reshape(b.shape[0], -1, count).permute(2, 0, 1)

    def _is_transposed(self, weight: Tensor) -> bool:
        return weight.ndim == 3 and is_transposed(self.base_layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and self._can_use_rank_space(args):
            return self._forward_in_rank_space(*args)
        if self.routing.mixed:
            self._check_order()
            return self._forward_by_adapter(args, kwargs)
        entry = self.entries[self.routing.slot]
        if entry is None:
            return self.base_layer(*args, **kwargs)
        inner = "base_layer." * (len(self._list_chain()) - 2) + self.parameter
        changed = {inner: self.changed(entry, self.base_weight)}
        return torch.func.functional_call(self.base_layer, changed, args, kwargs)

    def _can_use_rank_space(self, args: tuple[Any, ...]) -> bool:
        """Whether experts that say how they compute are called, and nothing of them but their matrices has pairs."""
        *wrappers, module = self._list_chain()
        if torch.compiler.is_compiling() or len(args) != 3 or not (is_fused_experts(module) and is_unmodified(module)):
            return False
        return {getattr(wrapper, "parameter", "") for wrapper in wrappers} <= EXPERT_MATRICES

    def _check_order(self) -> None:
        """Raise RoutingError where tokens may come in another order than the batch's."""
        module = unwrap_module(self)
        if self.base_weight.ndim == 3 and not is_fused_experts(module):
            raise RoutingError(
                f"a {type(module).__name__} does not say which row a token belongs to, so rows of adapters that cover "
                "it cannot differ",
                hint="use() one adapter at a time, or adapters that leave the experts alone",
            )

    def _forward_in_rank_space(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        *wrappers, module = self._list_chain()
        self.routing.check(states)
        rows = self.routing.rows if self.routing.mixed else (self.routing.slot,)
        slots = tuple(sorted(set(rows)))
        factors = {layer.parameter: layer.factors(slots) for layer in wrappers if isinstance(layer, LoraParameter)}
        updates = {name: held for name, held in factors.items() if held is not None}
        if not updates:
            unchanged: Tensor = module(states, index, weights)
            return unchanged
        owner = None
        if len(slots) > 1:
            owner = torch.tensor([slots.index(slot) for slot in rows], device=states.device)
            owner = owner.repeat_interleave(states.shape[0] // len(rows))
        return forward_experts(module, states, index, weights, updates, owner)

    def factors(self, slots: tuple[int, ...]) -> ExpertFactors | None:
        """The pairs of some slots as `mixture` takes them; None where none of them has any.

        Those that nobody trains are made once, and kept until others are asked for.
        """
        entries = [self.entries[slot] for slot in slots]
        held = [entry for entry in entries if entry is not None]
        if not held:
            return None
        if any(isinstance(entry.tensors[A], nn.Parameter) for entry in held):
            return self._stack_factors(entries, self.base_weight.dtype)
        key, kept = (slots, self.base_weight.dtype), self.routing.row_cache.get(self)
        if kept is None or kept[0] != key:
            # Memory made in inference mode could not be used in training.
            with torch.inference_mode(False), torch.no_grad():
                kept = self.routing.row_cache[self] = key, self._stack_factors(entries, self.base_weight.dtype)
        found: ExpertFactors = kept[1]
        return found

    def _stack_factors(self, entries: Sequence[SlotEntry | None], dtype: torch.dtype) -> ExpertFactors:
        """Stacked adapter by adapter within each expert, with zeros where one has none, or is of lower rank."""
        sides = [(*self._split_by_expert(entry), entry.scaling) if entry else None for entry in entries]
        like = next(side for side in sides if side)
        nothing = like[0][:, :0], like[1][:, :, :0], 0.0
        exact = torch.promote_types(like[1].dtype, dtype)
        rank = round_up_rank(max(side[0].shape[1] for side in sides if side), dtype)
        chosen = [side or nothing for side in sides]
        a = torch.stack([_pad_rank(each.to(dtype), rank) for each, _, _ in chosen], 1)
        b = torch.stack([_pad_rank((each.mT.to(exact) * s).to(dtype), rank) for _, each, s in chosen], 1)
        return ExpertFactors(a.flatten(0, 1).mT, b.flatten(0, 1))


def is_transposed(module: nn.Module) -> bool:
    """Whether a module of experts keeps its weights as (E, in, out)."""
    return bool(getattr(module, "is_transposed", False))


def _pad_rank(tensor: Tensor, rank: int) -> Tensor:
    """(E, r, features) with zeros up to a rank."""
    return functional.pad(tensor, (0, 0, 0, rank - tensor.shape[1]))


def _join_outputs(parts: Sequence[Any], back: Tensor) -> Any:
    """The outputs of parts of a batch in the order of the whole: tensors, or tuples of tensors."""
    if isinstance(parts[0], tuple):
        return tuple(_join_outputs(each, back) for each in zip(*parts, strict=True))
    return torch.cat(list(parts)).index_select(0, back)
