"""Fingerprints of base models: the structure and a sample of the weights distinguish one from another."""

from __future__ import annotations

import functools
import hashlib
import weakref
from collections.abc import Collection, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from lora_kit.layers.introspect import features_of, is_unquantized, kind_of
from lora_kit.layers.offloaded_weights import read_offloaded
from lora_kit.targets.match import Modules, named_layers

SAMPLED_TENSORS: Final = 32
"""Parameters that are sampled, about; at least this many where the model has them."""
SAMPLED_VALUES: Final = 32
"""Values sampled of each parameter."""
_STRUCTURAL: Final = ("linear", "embedding")
_FLOAT16_MARK: Final = "float16:"
_STEP: Final = 2**-7
"""Relative distance of neighboring bfloat16 values, at most."""
_SMALLEST: Final = 2**-24
"""Absolute distance of neighboring float16 values near zero."""
_KEPT: Final = weakref.WeakKeyDictionary[nn.Module, dict[str, object]]()
"""Fingerprints of models whose weights several processes share."""


def fingerprint(model: nn.Module, *, name: str | None = None) -> dict[str, object]:
    """Return the structure and sampled weights of a base model, with or without a bank attached.

    Quantized weights, and those on meta, are not sampled. Offloaded ones are: of them there is a copy elsewhere.

    Returns:
        `{"name", "structure": sha256, "weights": {parameter: hex}}`. The hex digits are evenly spaced values, rounded
        to bfloat16, big-endian. The prefix `float16:` marks values that were float16 before.
    """
    if model in _KEPT:
        return {**_KEPT[model], "name": name}
    layers = list(named_layers(model))
    owners = _find_owners(layers)
    names = sorted(owners)
    chosen = names[:: max(1, len(names) // SAMPLED_TENSORS)]
    sampled = {key: _read_parameter(owners[key], key) for key in chosen}
    return {
        "name": name,
        "structure": _hash_structure(layers),
        "weights": {key: _sample(tensor) for key, tensor in sampled.items() if tensor is not None},
    }


def keep_fingerprint(model: nn.Module) -> None:
    """Let a model's fingerprint be what it is now: its weights will not be readable any more."""
    _KEPT[model] = fingerprint(model)


def list_base_mismatches(
    expected: Mapping[str, object], modules: Modules, *, ignore: Collection[str] = ()
) -> list[str]:
    """List how a model differs from the base that a fingerprint was taken of; one message each.

    The same base in fp32, fp16 and bf16 has no mismatches.

    Args:
        expected: the fingerprint.
        modules: of the model to compare with it, from `named_layers`.
        ignore: paths of modules whose weights an adapter replaces, so that the base's do not matter.
    """
    mismatches, weights = list[str](), expected.get("weights") or {}
    if expected.get("structure") not in (None, _hash_structure(modules)):
        mismatches.append("its layers have other names or shapes")
    if not isinstance(weights, Mapping):
        return [*mismatches, "its fingerprint is damaged"]
    owners = _find_owners(modules, within={key.rpartition(".")[0] for key in weights})
    names = [key for key in weights if key in owners and not _is_within(key, ignore)]
    compared = {key: tensor for key in names if (tensor := _read_parameter(owners[key], key)) is not None}
    different = [key for key, tensor in compared.items() if not _is_same(weights[key], _sample(tensor))]
    if different:
        mismatches.append(f"{len(different)} of {len(compared)} sampled weights differ, {different[0]} among them")
    return mismatches


def list_fingerprint_mismatches(
    one: Mapping[str, object], other: Mapping[str, object], *, ignore: Collection[str] = ()
) -> list[str]:
    """List how two fingerprints differ; nothing where they may be of one base.

    Args:
        ignore: as in `list_base_mismatches`.
    """
    mismatches = []
    structures = one.get("structure"), other.get("structure")
    if None not in structures and structures[0] != structures[1]:
        mismatches.append("the layers of their bases have other names or shapes")
    first, second = (
        value if isinstance(value, Mapping) else {} for value in (one.get("weights"), other.get("weights"))
    )
    compared = [key for key in first if key in second and not _is_within(key, ignore)]
    different = [key for key in compared if not isinstance(second[key], str) or not _is_same(first[key], second[key])]
    if different:
        mismatches.append(
            f"{len(different)} of {len(compared)} sampled weights of their bases differ, {different[0]} among them"
        )
    return mismatches


def _is_within(key: str, paths: Collection[str]) -> bool:
    return any(key.startswith(f"{path}.") for path in paths)


def _hash_structure(modules: Modules) -> str:
    """Return the sha256 of the paths, kinds and shapes of the linear layers and embeddings."""
    # Without convolutions, so that adapters from before these could have LoRA weights still match their base.
    kinds = [(path, module, kind_of(module)) for path, module in modules]
    layers = [f"{path} {kind} {features_of(module)}" for path, module, kind in kinds if kind in _STRUCTURAL]
    return hashlib.sha256("\n".join(sorted(layers)).encode()).hexdigest()


def _find_owners(modules: Modules, within: Collection[str] | None = None) -> dict[str, nn.Module]:
    """Return, by the name of each parameter whose values are not quantized, the module that it belongs to.

    Args:
        within: paths of the modules that are looked into; None for all.
    """
    return {
        f"{path}.{key}" if path else key: module
        for path, module in modules
        if within is None or path in within
        for key, parameter in module._parameters.items()
        if parameter is not None and is_unquantized(parameter)
    }


def _read_parameter(owner: nn.Module, name: str) -> Tensor | None:
    """Return a parameter, or the copy of an offloaded one; None where it is on meta without a copy."""
    key = name.rpartition(".")[2]
    parameter = owner._parameters[key]
    return read_offloaded(owner, key) if parameter is None or parameter.is_meta else parameter


def _sample(tensor: Tensor) -> str:
    """Return evenly spaced values of a tensor, encoded as in `fingerprint`."""
    flat = tensor.detach().reshape(-1)
    values = flat[_choose_positions(flat.numel()).to(flat.device)].to("cpu", torch.bfloat16).view(torch.int16).numpy()
    return (_FLOAT16_MARK if tensor.dtype == torch.float16 else "") + values.astype(">i2").tobytes().hex()


@functools.lru_cache(maxsize=SAMPLED_TENSORS)
def _choose_positions(count: int) -> Tensor:
    """Return evenly spaced positions among `count`: int64 (at most SAMPLED_VALUES,)."""
    return torch.linspace(0, count - 1, min(SAMPLED_VALUES, count), dtype=torch.float64).long()


def _is_same(one: object, other: str) -> bool:
    """Return whether two samples are of one tensor.

    A value that is rounded to float16 first and then to bfloat16 may end one step away from the same value rounded
    once. So where one of the two samples was float16, values may differ by a step; all others must be equal.
    """
    if not isinstance(one, str) or one.startswith(_FLOAT16_MARK) == other.startswith(_FLOAT16_MARK):
        return bool(one == other)
    one, other = one.removeprefix(_FLOAT16_MARK), other.removeprefix(_FLOAT16_MARK)
    if len(one) != len(other):
        return False
    try:
        a, b = _decode_sample(one), _decode_sample(other)
    except ValueError:
        return False
    return bool(((a - b).abs() <= _STEP * torch.maximum(a.abs(), b.abs()) + _SMALLEST).all())


def _decode_sample(digits: str) -> Tensor:
    """Return the values of big-endian bfloat16 hex digits: fp32 (values,)."""
    data = bytearray(bytes.fromhex(digits))
    data[::2], data[1::2] = data[1::2], data[::2]
    return torch.frombuffer(data, dtype=torch.bfloat16).float()
