"""What tells one base model from another of the same shapes: its structure, and a sample of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from lora_kit.layers import features_of, kind_of
from lora_kit.targets import named_layers

SAMPLED_TENSORS: Final = 32
SAMPLED_VALUES: Final = 32
_HALF: Final = "float16:"
_STEP: Final = 2**-7
"""Relative distance of neighbouring bfloat16 values, at most."""
_SMALLEST: Final = 2**-24
"""Absolute distance of neighbouring float16 values near zero."""


def fingerprint(model: nn.Module, *, name: str | None = None) -> dict[str, Any]:
    """Structure and sampled weights of a base model, with or without a bank attached.

    Quantised and meta weights are not sampled.

    Returns:
        `{"name", "structure": sha256, "weights": {parameter: hex}}`; the hex digits are evenly spaced values, rounded
        to bfloat16, big-endian, with `float16:` before them where they were rounded to that before.
    """
    sampled = _sampled_parameters(model)
    names = sorted(sampled)
    step = max(1, len(names) // SAMPLED_TENSORS)
    return {
        "name": name,
        "structure": _structure(model),
        "weights": {key: _sample(sampled[key]) for key in names[::step]},
    }


def differences(made_for: Mapping[str, Any], found: nn.Module, *, ignore: Collection[str] = ()) -> list[str]:
    """How a model differs from the base a fingerprint was taken of, in words; empty where it does not.

    One base in fp32, fp16 or bf16 is the same base.

    Args:
        ignore: paths of modules whose weights an adapter brings itself, so that the base's do not matter.
    """
    told = []
    if made_for.get("structure") not in (None, _structure(found)):
        told.append("its layers have other names or shapes")
    parameters, weights = _sampled_parameters(found), made_for.get("weights") or {}
    if not isinstance(weights, Mapping):
        return [*told, "its fingerprint is damaged"]
    compared = [key for key in weights if key in parameters and not any(key.startswith(f"{path}.") for path in ignore)]
    other = [key for key in compared if not _is_same(weights[key], _sample(parameters[key]))]
    if other:
        told.append(f"{len(other)} of {len(compared)} sampled weights differ, {other[0]} among them")
    return told


def _structure(model: nn.Module) -> str:
    layers = [f"{path} {kind_of(m)} {features_of(m)}" for path, m in named_layers(model) if kind_of(m)]
    return hashlib.sha256("\n".join(sorted(layers)).encode()).hexdigest()


def _sampled_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {key: p for key, p in _parameters(model) if p.is_floating_point() and not p.is_meta}


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for path, module in named_layers(model):
        for key, parameter in module.named_parameters(recurse=False):
            yield f"{path}.{key}" if path else key, parameter


def _sample(tensor: Tensor) -> str:
    """Evenly spaced values of a tensor."""
    flat = tensor.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(SAMPLED_VALUES, flat.numel()), dtype=torch.float64).long()
    values = flat[index.to(flat.device)].to("cpu", torch.bfloat16).view(torch.int16).numpy()
    return (_HALF if tensor.dtype == torch.float16 else "") + values.astype(">i2").tobytes().hex()


def _is_same(one: Any, other: str) -> bool:
    """Whether two samples are of one tensor.

    Rounding to float16 on the way to bfloat16 may end one step beside rounding at once, so that values which went that
    way are compared within a step; all others must be equal.
    """
    if not isinstance(one, str) or one.startswith(_HALF) == other.startswith(_HALF):
        return one == other
    one, other = one.removeprefix(_HALF), other.removeprefix(_HALF)
    if len(one) != len(other):
        return False
    try:
        a, b = _decoded(one), _decoded(other)
    except ValueError:
        return False
    return bool(((a - b).abs() <= _STEP * torch.maximum(a.abs(), b.abs()) + _SMALLEST).all())


def _decoded(digits: str) -> Tensor:
    data = bytearray(bytes.fromhex(digits))
    data[::2], data[1::2] = data[1::2], data[::2]
    return torch.frombuffer(data, dtype=torch.bfloat16).float()
