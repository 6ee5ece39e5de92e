"""What tells one base model from another of the same shapes: its structure, and a sample of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from lora_kit.layers import features_of, kind_of
from lora_kit.targets import named_layers

SAMPLED_TENSORS: Final = 32
SAMPLED_VALUES: Final = 64


def fingerprint(model: nn.Module, *, name: str | None = None) -> dict[str, Any]:
    """Structure and sampled weights of a base model, with or without a bank attached.

    Values are rounded to bfloat16 before they are hashed, so that a base loaded in fp32, fp16 or bf16 is the same base.
    Quantised and meta weights are not sampled.

    Returns:
        `{"name", "structure": sha256, "weights": {parameter: 16 hex digits}}`.
    """
    modules = list(named_layers(model))
    shapes = [f"{path} {kind_of(module)} {features_of(module)}" for path, module in modules if kind_of(module)]
    parameters = {
        f"{path}.{key}": parameter
        for path, module in modules
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point() and not parameter.is_meta
    }
    names = sorted(parameters)
    step = max(1, len(names) // SAMPLED_TENSORS)
    return {
        "name": name,
        "structure": hashlib.sha256("\n".join(sorted(shapes)).encode()).hexdigest(),
        "weights": {key: _sample(parameters[key]) for key in names[::step]},
    }


def differences(made_for: Mapping[str, Any], found: nn.Module, *, ignore: Collection[str] = ()) -> list[str]:
    """How a model differs from the base a fingerprint was taken of, in words; empty where it does not.

    Args:
        ignore: paths of modules whose weights an adapter brings itself, so that the base's do not matter.
    """
    told = []
    present = fingerprint(found)
    if made_for.get("structure") not in (None, present["structure"]):
        told.append("its layers have other names or shapes")
    parameters = {f"{path}.{key}": p for path, m in named_layers(found) for key, p in m.named_parameters(recurse=False)}
    compared = [
        key
        for key in made_for.get("weights") or {}
        if key in parameters and parameters[key].is_floating_point() and not parameters[key].is_meta
        if not any(key.startswith(path + ".") for path in ignore)
    ]
    other = [key for key in compared if _sample(parameters[key]) != made_for["weights"][key]]
    if other:
        told.append(f"{len(other)} of {len(compared)} sampled weights differ, {other[0]} among them")
    return told


def _sample(tensor: Tensor) -> str:
    """16 hex digits of evenly spaced values of a tensor."""
    flat = tensor.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(SAMPLED_VALUES, flat.numel()), dtype=torch.float64).long()
    values = flat[index.to(flat.device)].to("cpu", torch.bfloat16)
    return hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
