"""Modules of which one parameter has LoRA weights: fused experts, and others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_kit.errors import RoutingError
from lora_kit.layers.experts import EXPERT_MATRICES, ExpertFactors, forward_experts, is_fused_experts, is_unmodified
from lora_kit.layers.initialization import A, B
from lora_kit.layers.introspect import unwrap_module
from lora_kit.layers.route import Route
from lora_kit.layers.routing import Routing
from lora_kit.layers.row_split import forward_each_slot
from lora_kit.layers.slot_entry import SlotEntry
from lora_kit.layers.slot_layer import SlotLayer
from lora_kit.layers.token_runs import RunRoute, check_runs, count_tokens
from lora_kit.layers.unstacked_layer import UpdatedWeightLayer
from lora_kit.ops.grouped_mm import round_up_rank
from lora_kit.ops.lora_functions import guard_backward, iterate_tensors


class LoraParameter(UpdatedWeightLayer):
    """A module of which one parameter W has LoRA weights: it computes with Wₑ + scaling · Bₑ Aₑ for every expert e.

    The weights of all experts are concatenated as PEFT does for `target_parameters`: `lora_A` (E·r, in) expert by
    expert, `lora_B` (out, r·E) with the experts of one rank side by side. W is (E, out, in), or (E, in, out) where the
    module says `is_transposed`; a matrix (out, in) is one expert. Where several parameters of a module have LoRA
    weights, one wrapper is around the other.

    Experts that describe how they compute are computed in rank space, by the outermost wrapper for all. Other modules
    are black boxes, which are given the sum instead of W.

    Attributes:
        parameter: name of W in the innermost module.
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

    def _find_entry(self, slot: int, name: str) -> SlotEntry | None:
        return self.entries[slot] if self.parameter == name else None

    def _list_chain(self) -> list[nn.Module]:
        """Return this wrapper, those inside it, and the innermost module."""
        chain: list[nn.Module] = [self]
        while isinstance(chain[-1], SlotLayer):
            chain.append(chain[-1].base_layer)
        return chain

    def compute_updated_weight(self, entry: SlotEntry, weight: Tensor) -> Tensor:
        each_a, each_b = self._split_by_expert(entry)
        each_a, each_b = each_a.to(weight.dtype), each_b.to(weight.dtype)
        left, right = (each_a.mT, each_b.mT) if self._is_transposed(weight) else (each_b, each_a)
        experts = weight if weight.ndim == 3 else weight.unsqueeze(0)
        # Autocast would change the dtype of the sum, which is the module's to choose.
        with torch.autocast(weight.device.type, enabled=False):
            return torch.baddbmm(experts, left, right, alpha=entry.scaling).view(weight.shape)

    def _split_by_expert(self, entry: SlotEntry) -> tuple[Tensor, Tensor]:
        """Return A as (E, r, in) and B as (E, out, r)."""
        a, b = entry.tensors[A], entry.tensors[B]
        count = self.base_weight.shape[0] if self.base_weight.ndim == 3 else 1
        return a.reshape(count, -1, a.shape[-1]), b.reshape(b.shape[0], -1, count).permute(2, 0, 1)

    def _is_transposed(self, weight: Tensor) -> bool:
        return weight.ndim == 3 and is_transposed(self.base_layer)

    def reason_no_runs(self) -> str | None:
        *_, module = self._list_chain()
        if is_unmodified(module) and is_fused_experts(module) and self.parameter in EXPERT_MATRICES:
            return None
        return f"a {type(module).__name__} is computed with one changed weight at a time"

    def forward(self, *args: object, **kwargs: object) -> object:
        route = self.routing.get_route()
        if isinstance(route, RunRoute):
            return self._forward_runs(route, *args, **kwargs)
        if not kwargs and self._can_use_rank_space(args):
            return self._forward_in_rank_space(route, *args)  # type: ignore[arg-type]  # three tensors, as experts take them
        if route.mixed:
            self._check_token_order()
            return forward_each_slot(self, route.rows, args, kwargs, self._forward_slot)
        entry = self.entries[route.slot]
        with self.lock_module():
            if entry is None:
                return self.call_base(*args, **kwargs)
            inner = "base_layer." * (len(self._list_chain()) - 2) + self.parameter
            updated = {inner: self.compute_updated_weight(entry, self.base_weight)}
            output: object = torch.func.functional_call(self.base_layer, updated, args, kwargs)
        reads_base = any(x.requires_grad for x in iterate_tensors([args, kwargs]))
        own = entry.list_read_as(self.base_weight.dtype)
        guard_backward(output, [*own, *self.base_layer.parameters()] if reads_base else own)
        return output

    def _forward_runs(self, route: RunRoute, *args: object, **kwargs: object) -> object:
        """Compute tokens (T, hidden) of runs, each as a row."""
        wrappers = [layer for layer in self._list_chain() if isinstance(layer, SlotLayer)]
        for layer in wrappers:
            check_runs(layer, route)
        if not any(layer.entries[slot] for layer in wrappers for slot in route.slots):
            *_, module = self._list_chain()
            return module(*args, **kwargs)
        states = args[0]
        assert isinstance(states, Tensor)
        with self.routing.use_route(route.get_rows(count_tokens(states))):
            return self(*args, **kwargs)

    def _forward_slot(self, slot: int, args: tuple[Tensor, ...]) -> object:
        with self.routing.use_route(self.routing.make_slot_route(slot)):  # of the wrappers inside this one too
            return self(*args)

    def _can_use_rank_space(self, args: tuple[object, ...]) -> bool:
        """Return whether these are experts that describe how they compute, with LoRA weights of matrices only."""
        *wrappers, module = self._list_chain()
        if torch.compiler.is_compiling() or len(args) != 3 or not (is_unmodified(module) and is_fused_experts(module)):
            return False
        return {getattr(wrapper, "parameter", "") for wrapper in wrappers} <= EXPERT_MATRICES

    def _check_token_order(self) -> None:
        """Raise RoutingError where tokens may come in another order than the batch's."""
        module = unwrap_module(self)
        if self.base_weight.ndim == 3 and not is_fused_experts(module):
            raise RoutingError(
                f"a {type(module).__name__} does not say which row a token belongs to, so rows of adapters that cover "
                "it cannot differ",
                hint="use() one adapter at a time, or adapters that leave the experts alone",
            )

    def _forward_in_rank_space(self, route: Route, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        *wrappers, module = self._list_chain()
        rows = route.slots
        slots = tuple(sorted(set(rows)))
        factors = {
            layer.parameter: layer.get_factors(route, slots) for layer in wrappers if isinstance(layer, LoraParameter)
        }
        updates = {name: update for name, update in factors.items() if update is not None}
        if not updates:
            unchanged: Tensor = module(states, index, weights)
            return unchanged
        assert is_fused_experts(module)
        self.routing.check_rows(route, states, self)
        owner = None
        if len(slots) > 1:
            owner = torch.tensor([slots.index(slot) for slot in rows], device=states.device)
            owner = owner.repeat_interleave(states.shape[0] // len(rows))
        return forward_experts(module, states, index, weights, updates, owner)

    def get_factors(self, route: Route, slots: tuple[int, ...]) -> ExpertFactors | None:
        """Return the LoRA weights of some slots as `forward_experts` takes them; None where no slot has any.

        Those that are not trained are made once, and cached until others are asked for.
        """
        entries = [self.entries[slot] for slot in slots]
        present = [entry for entry in entries if entry is not None]
        dtype = self.base_weight.dtype
        if not present:
            return None
        if any(isinstance(entry.tensors[A], nn.Parameter) for entry in present):
            return self._stack_factors(entries, dtype)
        cache = self.routing.get_row_cache(route).expert_factors
        key, cached = (slots, dtype), cache.get(self)
        if cached is None or cached[0] != key:
            # Memory made in inference mode could not be used in training.
            with torch.inference_mode(False), torch.no_grad():
                cached = key, self._stack_factors(entries, dtype)
            cache[self] = cached
        return cached[1]

    def _stack_factors(self, entries: Sequence[SlotEntry | None], dtype: torch.dtype) -> ExpertFactors:
        """Stack adapter by adapter within each expert, with zeros where one has none, or is of lower rank."""
        sides = [(*self._split_by_expert(entry), entry.scaling) if entry else None for entry in entries]
        like = next(side for side in sides if side)
        empty = like[0][:, :0], like[1][:, :, :0], 0.0
        exact = torch.promote_types(like[1].dtype, dtype)
        rank = round_up_rank(max(side[0].shape[1] for side in sides if side), dtype)
        chosen = [side or empty for side in sides]
        a = torch.stack([_pad_rank(each.to(dtype), rank) for each, _, _ in chosen], 1)
        b = torch.stack([_pad_rank((each.mT.to(exact) * s).to(dtype), rank) for _, each, s in chosen], 1)
        return ExpertFactors(a.flatten(0, 1).mT, b.flatten(0, 1))


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module of experts keeps its weights as (E, in, out)."""
    return bool(getattr(module, "is_transposed", False))


def _pad_rank(tensor: Tensor, rank: int) -> Tensor:
    """Return (E, r, features) with zeros up to a rank."""
    return functional.pad(tensor, (0, 0, 0, rank - tensor.shape[1]))
