"""Fused experts in rank space: a mixture computes with Wₑ + s Bₑ Aₑ, and no such sum is formed.

For a token x that is sent to expert e, each of the expert's two products is

    x Wₑᵀ + s (x Aₑᵀ) Bₑᵀ        with the A and B of the adapter of the token's row

Tokens are sorted by expert, and within an expert by adapter: each product is one grouped product for all experts,
whatever the number of adapters. What lies between the products (bias, gate, norm) is asked of the module itself, which
says how it computes: transformers gives every class of fused experts the same few attributes, and has implementations
that go by nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from lora_kit.layers.introspect import is_unquantized
from lora_kit.ops.grouped_mm import grouped_matmul

EXPERT_MATRICES: Final = frozenset({"gate_up_proj", "up_proj", "down_proj"})
"""Parameters of fused experts that tokens are multiplied with."""
_REQUIRED_ATTRIBUTES: Final = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")
_HOOKS: Final = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass(frozen=True)
class ExpertFactors:
    """The pairs of one parameter, for every expert e and adapter k of a batch at e · K + k.

    Attributes:
        a: (E·K, in, r). b: (E·K, r, out), times the scaling. In the dtype of the parameter.
    """

    a: Tensor
    b: Tensor


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module is fused experts that say how they compute, and are called with tokens in the batch's order."""
    return all(hasattr(module, name) for name in _REQUIRED_ATTRIBUTES)


def list_own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter | None]]:
    """A module's own parameters in the order in which its class makes them, by which an adapter's file counts them.

    PEFT takes a parameter out and puts it back behind the others whenever it computes with a changed one. Classes of
    fused experts make what leads into them first, and each bias after its matrix.
    """
    found = list(module._parameters.items())
    return sorted(found, key=lambda item: _creation_key(item[0])) if is_fused_experts(module) else found


def _creation_key(name: str) -> tuple[bool, bool]:
    return name.startswith("down_proj"), name.endswith("_bias")


def is_unmodified(module: nn.Module) -> bool:
    """Whether fused experts compute as they say and do nothing else: not hooked, quantised or spread over devices."""
    held = [tensor for tensor in module._parameters.values() if tensor is not None]
    if getattr(module, "_is_expert_parallel", False) or "forward" in module.__dict__:
        return False
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return False
    return all(is_unquantized(tensor) for tensor in held)


def forward_experts(
    module: Any,
    states: Tensor,
    index: Tensor,
    weights: Tensor,
    updates: Mapping[str, ExpertFactors],
    owner: Tensor | None,
) -> Tensor:
    """What fused experts give with updates of their parameters.

    Args:
        states: (n, hidden). index, weights: (n, k): the experts of each token, and how much each counts.
        updates: by the parameter's name, of one number of adapters K.
        owner: (n,) int64 below K, whose update each token gets; None where K is 1.

    Returns:
        (n, hidden) in the dtype of the states.
    """
    adapters = next(iter(updates.values())).a.shape[0] // module.num_experts
    key = index.reshape(-1)
    if owner is not None:
        key = key * adapters + owner.repeat_interleave(index.shape[1])
    key, order = key.sort(stable=True)
    groups = torch.arange(module.num_experts * adapters, device=key.device)
    sent = _DispatchedTokens(module, key // adapters, torch.searchsorted(key, groups, right=True).int(), adapters)
    x = states.index_select(0, order // index.shape[1])
    if module.has_gate:
        x = module._apply_gate(sent.multiply_by("gate_up_proj", x, updates))
    else:
        x = module.act_fn(sent.multiply_by("up_proj", x, updates))
    x = sent.multiply_by("down_proj", x, updates)
    if getattr(module, "has_post_expert_norm", False):
        x = module.post_expert_norm(x)
    x = x * weights.reshape(-1).index_select(0, order).unsqueeze(1)
    return x.index_select(0, order.argsort()).view(*index.shape, -1).sum(1).to(states.dtype)


@dataclass(frozen=True)
class _DispatchedTokens:
    """Tokens in the order in which experts take them.

    Attributes:
        expert: (n·k,) of each. ends: (E·K,) int32, where those of each expert and adapter end.
    """

    module: Any
    expert: Tensor
    ends: Tensor
    adapters: int

    def multiply_by(self, name: str, x: Tensor, updates: Mapping[str, ExpertFactors]) -> Tensor:
        """The product with one parameter, its bias and its update added.

        Args:
            x: (n·k, in).
        """
        weight, update = getattr(self.module, name), updates.get(name)
        x = x.to(weight.dtype)
        whole = self.ends[self.adapters - 1 :: self.adapters].contiguous()  # of an expert, whatever the adapter
        y = grouped_matmul(x, weight if self.module.is_transposed else weight.mT, whole)
        if self.module.has_bias:
            y.add_(getattr(self.module, f"{name}_bias").index_select(0, self.expert))
        if update is not None:
            y.add_(grouped_matmul(grouped_matmul(x, update.a, self.ends), update.b, self.ends))
        return y
