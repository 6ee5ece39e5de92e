"""Layers with a forward of their own, which may compute with something else than the weight that they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_kit.layers.grouped_linear import is_grouped_linear
from lora_kit.layers.introspect import is_unquantized

_CONVOLUTIONS: Final[dict[int, Callable[..., Tensor]]] = {3: functional.conv1d, 4: functional.conv2d}
"""By the number of dimensions of the weight."""


def reason_not_mergeable(module: nn.Module) -> str | None:
    """Return why a change of a layer's weight is not the change of its output that LoRA weights make; None where it is.

    A subclass with a forward of its own is tried with random weights: a convolution that standardizes its weight, say,
    would standardize the merged weight as well.
    """
    if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        return None
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other tensors (a parametrization)"
    is_plain = type(module).forward.__module__.startswith("torch.") or is_grouped_linear(module)
    if is_plain or not is_unquantized(weight) or _follows_its_weight(module):
        return None
    return f"a {type(module).__name__} computes with something else than the weight that it holds"


def _follows_its_weight(module: nn.Linear | nn.Conv1d | nn.Conv2d) -> bool:
    """Return whether f(W + D) - f(W) is the plain layer's output for a weight D."""
    generator = torch.Generator().manual_seed(0)
    own = (*module.named_parameters(), *module.named_buffers())
    tensors = {name: _draw(tensor.shape, generator) for name, tensor in own}
    weight, change = tensors["weight"], _draw(module.weight.shape, generator)
    size = (2, module.in_features) if isinstance(module, nn.Linear) else (2, module.in_channels, *_size_of(module))
    x = torch.randn(size, generator=generator)
    with torch.no_grad():
        before = torch.func.functional_call(module, tensors, (x,))
        after = torch.func.functional_call(module, tensors | {"weight": _add(weight, change)}, (x,))
        plain = _compute_plain(module, x, change)
    if not isinstance(after, Tensor) or after.shape != plain.shape:
        return False
    return torch.allclose(after - before, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))


def _draw(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return random numbers, the same for each index of the first axis, so that they take little memory."""
    return torch.randn(1, *shape[1:], generator=generator).expand(shape) if shape else torch.ones(())


def _add(weight: Tensor, change: Tensor) -> Tensor:
    return (weight[:1] + change[:1]).expand(weight.shape)


def _size_of(module: nn.Conv1d | nn.Conv2d) -> list[int]:
    return [2 * size + 4 for size in module.kernel_size]


def _compute_plain(module: nn.Linear | nn.Conv1d | nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(module, nn.Linear):
        return functional.linear(x, weight)
    return _CONVOLUTIONS[weight.ndim](x, weight, stride=module.stride, padding=module.padding)
