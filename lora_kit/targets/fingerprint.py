"""What tells one base model from another of the same shapes: its structure, and a sample of its weights."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from lora_kit.layers.introspect import features_of, is_unquantized, kind_of
from lora_kit.targets.match import Modules, named_layers

SAMPLED_TENSORS: Final = 32
SAMPLED_VALUES: Final = 32
_STRUCTURAL: Final = ("linear", "embedding")
_FLOAT16_MARK: Final = "float16:"
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
    layers = list(named_layers(model))
    sampled = _collect_sampled_parameters(layers)
    names = sorted(sampled)
    chosen = names[:: max(1, len(names) // SAMPLED_TENSORS)]
    return {
        "name": name,
        "structure": _hash_structure(layers),
        "weights": {key: _sample(sampled[key]) for key in chosen},
    }


def list_base_mismatches(made_for: Mapping[str, Any], found: nn.Module, *, ignore: Collection[str] = ()) -> list[str]:
    """How a model differs from the base a fingerprint was taken of, in words; empty where it does not.

    One base in fp32, fp16 or bf16 is the same base.

    Args:
        ignore: paths of modules whose weights an adapter brings itself, so that the base's do not matter.
    """
    told, layers = [], list(named_layers(found))
    if made_for.get("structure") not in (None, _hash_structure(layers)):
        told.append("its layers have other names or shapes")
    parameters, weights = _collect_sampled_parameters(layers), made_for.get("weights") or {}
    if not isinstance(weights, Mapping):
        return [*told, "its fingerprint is damaged"]
    compared = [key for key in weights if key in parameters and not _is_within(key, ignore)]
    other = [key for key in compared if not _is_same(weights[key], _sample(parameters[key]))]
    if other:
        told.append(f"{len(other)} of {len(compared)} sampled weights differ, {other[0]} among them")
    return told


def list_fingerprint_mismatches(
    one: Mapping[str, Any], other: Mapping[str, Any], *, ignore: Collection[str] = ()
) -> list[str]:
    """How two fingerprints tell two bases apart, in words; empty where they are of one base.

    Args:
        ignore: as in `differences`.
    """
    told = []
    structures = one.get("structure"), other.get("structure")
    if None not in structures and structures[0] != structures[1]:
        told.append("their bases' layers have other names or shapes")
    weights = [found if isinstance(found, Mapping) else {} for found in (one.get("weights"), other.get("weights"))]
    common = [key for key in weights[0] if key in weights[1] and not _is_within(key, ignore)]
    pairs = {key: (weights[0][key], weights[1][key]) for key in common}
    unlike = [key for key, (a, b) in pairs.items() if not isinstance(b, str) or not _is_same(a, b)]
    if unlike:
        told.append(f"{len(unlike)} of {len(common)} sampled weights of their bases differ, {unlike[0]} among them")
    return told


def _is_within(key: str, paths: Collection[str]) -> bool:
    return any(key.startswith(f"{path}.") for path in paths)


def _hash_structure(modules: Modules) -> str:
    # Convolutions are left out: adapters that were made before these could carry pairs keep their base.
    kinds = [(path, module, kind_of(module)) for path, module in modules]
    layers = [f"{path} {kind} {features_of(module)}" for path, module, kind in kinds if kind in _STRUCTURAL]
    return hashlib.sha256("\n".join(sorted(layers)).encode()).hexdigest()


def _collect_sampled_parameters(modules: Modules) -> dict[str, nn.Parameter]:
    found = {}
    for path, module in modules:
        for key, parameter in module._parameters.items():
            if parameter is not None and is_unquantized(parameter) and not parameter.is_meta:
                found[f"{path}.{key}" if path else key] = parameter
    return found


def _sample(tensor: Tensor) -> str:
    """Evenly spaced values of a tensor."""
    flat = tensor.detach().reshape(-1)
    values = flat[_choose_positions(flat.numel()).to(flat.device)].to("cpu", torch.bfloat16).view(torch.int16).numpy()
    return (_FLOAT16_MARK if tensor.dtype == torch.float16 else "") + values.astype(">i2").tobytes().hex()


@functools.lru_cache(maxsize=SAMPLED_TENSORS)
def _choose_positions(count: int) -> Tensor:
    return torch.linspace(0, count - 1, min(SAMPLED_VALUES, count), dtype=torch.float64).long()


def _is_same(one: Any, other: str) -> bool:
    """Whether two samples are of one tensor.

    Rounding to float16 on the way to bfloat16 may end one step beside rounding at once, so that values which went that
    way are compared within a step; all others must be equal.
    """
    if not isinstance(one, str) or one.startswith(_FLOAT16_MARK) == other.startswith(_FLOAT16_MARK):
        return one == other
    one, other = one.removeprefix(_FLOAT16_MARK), other.removeprefix(_FLOAT16_MARK)
    if len(one) != len(other):
        return False
    try:
        a, b = _decode_sample(one), _decode_sample(other)
    except ValueError:
        return False
    return bool(((a - b).abs() <= _STEP * torch.maximum(a.abs(), b.abs()) + _SMALLEST).all())


def _decode_sample(digits: str) -> Tensor:
    data = bytearray(bytes.fromhex(digits))
    data[::2], data[1::2] = data[1::2], data[::2]
    return torch.frombuffer(data, dtype=torch.bfloat16).float()
