"""Fused experts in rank space: a mixture computes with Wₑ + s Bₑ Aₑ, and no such sum is formed.

For a token x that is sent to expert e, each of the expert's two products is

    x Wₑᵀ + s (x Aₑᵀ) Bₑᵀ        with the A and B of the adapter of the token's row

Tokens are sorted by expert, and within an expert by adapter: each product is one grouped product for all experts,
whatever the number of adapters. What comes between the products (bias, gate, norm) is read from the module itself:
transformers gives every class of fused experts the same few attributes, and has implementations that use nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from lora_kit.layers.introspect import is_unquantized, reason_black_box
from lora_kit.ops.grouped_mm import grouped_matmul

EXPERT_MATRICES: Final = frozenset({"gate_up_proj", "up_proj", "down_proj"})
"""Parameters of fused experts that tokens are multiplied with."""
_REQUIRED_ATTRIBUTES: Final = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")


class FusedExperts(Protocol):
    """What transformers' fused experts say of how they compute; matrices and biases are attributes by name.

    Attributes:
        num_experts: E.
        has_gate: whether the first product is `gate_up_proj` and `_apply_gate` follows; else `up_proj` and `act_fn`.
        has_bias: whether each matrix has a `<name>_bias` (E, out).
        is_transposed: whether matrices are (E, in, out).
    """

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool

    def _apply_gate(self, gate_up: Tensor) -> Tensor: ...

    def act_fn(self, x: Tensor) -> Tensor: ...

    def post_expert_norm(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class ExpertFactors:
    """The LoRA weights of one parameter, for every expert e and adapter k of a batch at e · K + k.

    Attributes:
        a: (E·K, in, r), in the dtype of the parameter.
        b: (E·K, r, out), times the scaling, in the same dtype.
    """

    a: Tensor
    b: Tensor


def is_fused_experts(module: object) -> TypeGuard[FusedExperts]:
    """Return whether a module is fused experts that say how they compute, and take tokens in the batch's order."""
    return all(hasattr(module, name) for name in _REQUIRED_ATTRIBUTES)


def list_own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter | None]]:
    """Return a module's own parameters in the order in which its class makes them; an adapter's file numbers them so.

    PEFT removes a parameter and appends it again whenever it computes with an updated one, so the present order says
    nothing. Classes of fused experts make the first product's parameters first, and each bias after its matrix.
    """
    parameters = list(module._parameters.items())
    return sorted(parameters, key=lambda item: _creation_key(item[0])) if is_fused_experts(module) else parameters


def _creation_key(name: str) -> tuple[bool, bool]:
    return name.startswith("down_proj"), name.endswith("_bias")


def is_unmodified(module: nn.Module) -> bool:
    """Return whether fused experts compute as they say: not hooked, replaced, quantized or spread over devices."""
    if getattr(module, "_is_expert_parallel", False) or reason_black_box(module) is not None:
        return False
    return all(is_unquantized(tensor) for tensor in module._parameters.values() if tensor is not None)


def forward_experts(
    module: FusedExperts,
    states: Tensor,
    index: Tensor,
    weights: Tensor,
    updates: Mapping[str, ExpertFactors],
    owner: Tensor | None,
) -> Tensor:
    """Compute fused experts with updates of their parameters.

    Args:
        states: (n, hidden).
        index: (n, k) int64, the experts of each token.
        weights: (n, k), the weight of each of them.
        updates: by the parameter's name, all for the same number of adapters K.
        owner: (n,) int64 below K, the adapter of each token; None where K is 1.

    Returns:
        (n, hidden) in the dtype of the states.
    """
    adapters = next(iter(updates.values())).a.shape[0] // module.num_experts
    key = index.reshape(-1)
    if owner is not None:
        key = key * adapters + owner.repeat_interleave(index.shape[1])
    key, order = key.sort(stable=True)
    groups = torch.arange(module.num_experts * adapters, device=key.device)
    tokens = _DispatchedTokens(module, key // adapters, torch.searchsorted(key, groups, right=True).int(), adapters)
    x = states.index_select(0, order // index.shape[1])
    if module.has_gate:
        x = module._apply_gate(tokens.multiply_by("gate_up_proj", x, updates))
    else:
        x = module.act_fn(tokens.multiply_by("up_proj", x, updates))
    x = tokens.multiply_by("down_proj", x, updates)
    if getattr(module, "has_post_expert_norm", False):
        x = module.post_expert_norm(x)
    x = x * weights.reshape(-1).index_select(0, order).unsqueeze(1)
    return x.index_select(0, order.argsort()).view(*index.shape, -1).sum(1).to(states.dtype)


@dataclass(frozen=True)
class _DispatchedTokens:
    """Tokens in the order in which experts take them.

    Attributes:
        module: the experts.
        expert: (n·k,) int64, of each token.
        ends: (E·K,) int32, where the tokens of each expert and adapter end.
        adapters: K.
    """

    module: FusedExperts
    expert: Tensor
    ends: Tensor
    adapters: int

    def multiply_by(self, name: str, x: Tensor, updates: Mapping[str, ExpertFactors]) -> Tensor:
        """Multiply with one parameter, and add its bias and its update.

        Args:
            x: (n·k, in).

        Returns:
            (n·k, out) in the dtype of the parameter.
        """
        weight, update = getattr(self.module, name), updates.get(name)
        x = x.to(weight.dtype)
        expert_ends = self.ends[self.adapters - 1 :: self.adapters].contiguous()  # whatever the adapter
        y = grouped_matmul(x, weight if self.module.is_transposed else weight.mT, expert_ends)
        if self.module.has_bias:
            y.add_(getattr(self.module, f"{name}_bias").index_select(0, self.expert))
        if update is not None:
            y.add_(grouped_matmul(grouped_matmul(x, update.a, self.ends), update.b, self.ends))
        return y
