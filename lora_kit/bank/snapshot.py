"""From a trainable slot to an adapter, and back into its leaf parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.peft_keys import (
    PREFIX,
    classify_tensors,
    lora_weight_keys,
    magnitude_key,
    name_saved_heads,
    token_embeddings_key,
)
from lora_kit.bank.initialize import (
    InitialWeights,
    convert_to_saved,
    convert_to_trained,
    describe_initialization,
    make_plain_config,
)
from lora_kit.bank.model_layers import WrappedLayers
from lora_kit.bank.slots import LoadedAdapter
from lora_kit.config.lora_config import ALL_LINEAR, LoraConfig
from lora_kit.errors import AdapterError
from lora_kit.io.hub import split_revision
from lora_kit.layers.initialization import INITIAL_A, INITIAL_B, MAGNITUDE, A, B
from lora_kit.layers.introspect import kind_of
from lora_kit.layers.saved_module import SavedModule
from lora_kit.layers.token_embedding import TOKEN_EMBEDDINGS, TokenTable
from lora_kit.targets.coverage import find_shortest_names
from lora_kit.targets.fingerprint import fingerprint
from lora_kit.targets.match import name_saved_modules, named_layers
from lora_kit.targets.token_rows import path_of


def snapshot_adapter(loaded: LoadedAdapter, layers: WrappedLayers, model: nn.Module) -> Adapter:
    """Return a copy of a trainable adapter as it is now."""
    config = make_plain_config(_resolve_config(loaded, layers, model))
    with torch.no_grad():
        saved = convert_to_saved(collect_tensors(loaded, layers), _collect_initial_weights(loaded, layers))
        tensors = {key: tensor.to("cpu", copy=True).contiguous() for key, tensor in saved.items()}
    return Adapter(config, tensors, record={"base": fingerprint_model(model)} | describe_initialization(loaded.config))


def check_savable(loaded: LoadedAdapter, layers: WrappedLayers, model: nn.Module) -> None:
    """Raise AdapterError for a trainable adapter whose tensors do not match the config that it would be saved with."""
    config = make_plain_config(_resolve_config(loaded, layers, model))
    # Only names and shapes are checked; what is trained may have any value yet.
    tensors = collect_tensors(loaded, layers)
    zeros = {key: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for key, tensor in tensors.items()}
    classify_tensors(name_saved_heads(config, zeros), zeros, allow=())


def restore_adapter(name: str, loaded: LoadedAdapter, layers: WrappedLayers, adapter: Adapter) -> None:
    """Copy an adapter's values into a trainable one, leaf by leaf.

    Raises:
        AdapterError: the two do not hold the same tensors; nothing is copied.
    """
    leaves = collect_tensors(loaded, layers)
    values = convert_to_trained(adapter.tensors, _collect_initial_weights(loaded, layers))
    mismatches = _find_mismatches(leaves, values)
    for path, tokens in adapter.tokens().items():
        own = next((target.indices for target in loaded.coverage.tokens if target.path == path), tokens.indices)
        if own != tokens.indices:
            mismatches.append(f"{path} has rows of other tokens")
    if mismatches:
        raise AdapterError(f"this adapter does not match {name!r}:\n  " + "\n  ".join(sorted(mismatches)))
    with torch.no_grad():
        for key, leaf in leaves.items():
            leaf.copy_(values[key])


def load_trained_values(leaves: Mapping[str, Mapping[str, Tensor]], values: object) -> None:
    """Copy values into leaves of the same adapters and keys.

    Raises:
        AdapterError: they are not of the same adapters, or do not hold the same tensors; nothing is copied.
    """
    if not isinstance(values, Mapping) or not all(_is_tensors(each) for each in values.values()):
        raise AdapterError("a bank's state is a mapping of adapters to tensors by key", hint="bank.state_dict()")
    mismatches = [f"adapter {name!r} is missing" for name in leaves.keys() - values.keys()]
    mismatches += [f"adapter {name!r} is not expected" for name in values.keys() - leaves.keys()]
    for name in leaves.keys() & values.keys():
        mismatches += [f"{name!r}: {mismatch}" for mismatch in _find_mismatches(leaves[name], values[name])]
    if mismatches:
        raise AdapterError("this state does not match the bank:\n  " + "\n  ".join(sorted(mismatches)))
    with torch.no_grad():
        for name, own in leaves.items():
            for key, leaf in own.items():
                leaf.copy_(values[name][key])


def _is_tensors(values: object) -> bool:
    return isinstance(values, Mapping) and all(isinstance(value, Tensor) for value in values.values())


def _find_mismatches(leaves: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> list[str]:
    """Return what keeps values from being copied into leaves, in words."""
    mismatches = [f"{key} is missing" for key in leaves.keys() - values.keys()]
    mismatches += [f"{key} is not expected" for key in values.keys() - leaves.keys()]
    mismatches += [
        f"{key} is {tuple(values[key].shape)}, {tuple(leaves[key].shape)} is expected"
        for key in leaves.keys() & values.keys()
        if values[key].shape != leaves[key].shape
    ]
    return mismatches


def fingerprint_model(model: nn.Module) -> dict[str, object]:
    """Return the fingerprint of a bank's model."""
    return fingerprint(model, name=_name_of(model))


def collect_tensors(loaded: LoadedAdapter, layers: WrappedLayers) -> dict[str, Tensor]:
    """Return an adapter's leaf parameters by PEFT's keys."""
    tensors: dict[str, Tensor] = {}
    keys = {target.path: target.key for target in loaded.coverage.targets}
    for path in loaded.layers:
        layer, own = layers[path], layers.entry(path, loaded.slot).tensors
        if isinstance(layer, TokenTable):
            tensors[token_embeddings_key(path_of(path))] = own[TOKEN_EMBEDDINGS]
        elif isinstance(layer, SavedModule):
            tensors |= {f"{PREFIX}{path}.{key}": tensor for key, tensor in own.items()}
        else:
            key_a, key_b = lora_weight_keys(keys[path], kind_of(layer) or "linear")
            tensors[key_a], tensors[key_b] = own[A], own[B]
            if MAGNITUDE in own:
                tensors[magnitude_key(path)] = own[MAGNITUDE]
    return tensors


def _collect_initial_weights(loaded: LoadedAdapter, layers: WrappedLayers) -> InitialWeights:
    """Return an adapter's A₀ and B₀ by PEFT's keys of A and B; empty for one that was not initialized from weights."""
    initial = {}
    for target in loaded.coverage.targets:
        if target.starts_from_weight:
            tensors = layers.entry(target.path, loaded.slot).tensors
            initial[lora_weight_keys(target.key, target.kind)] = tensors[INITIAL_A], tensors[INITIAL_B]
    return initial


def _resolve_config(loaded: LoadedAdapter, layers: WrappedLayers, model: nn.Module) -> LoraConfig:
    """Return the config as it is saved: names instead of `all-linear`, and the base it belongs to."""
    config = loaded.config
    all_linear = config.target_modules == ALL_LINEAR
    conv1d = any(type(layers[path].base_layer).__name__ == "Conv1D" for path in loaded.layers)
    name, revision = split_revision(config.base_model_name_or_path or _name_of(model) or "")
    return dataclasses.replace(
        config,
        modules_to_save=name_saved_modules(list(named_layers(model)), config.modules_to_save, loaded.coverage.saved),
        target_modules=find_shortest_names(model, loaded.coverage) if all_linear else config.target_modules,
        fan_in_fan_out=config.fan_in_fan_out or conv1d,
        base_model_name_or_path=name or None,
        revision=revision or config.revision,
        inference_mode=True,
    )


def _name_of(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None
