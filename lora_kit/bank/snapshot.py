"""From a slot to the adapter it holds, and back into its leaf parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.peft_keys import PREFIX, lora_weight_keys, magnitude_key, token_embeddings_key
from lora_kit.bank.initialize import convert_to_saved, convert_to_trained, describe_initialization, make_plain_config
from lora_kit.bank.model_layers import WrappedLayers
from lora_kit.bank.residents import LoadedAdapter
from lora_kit.config.lora_config import ALL_LINEAR, LoraConfig
from lora_kit.errors import AdapterError
from lora_kit.io.hub import split_revision
from lora_kit.layers.initialization import INITIAL_A, INITIAL_B, MAGNITUDE, A, B
from lora_kit.layers.introspect import kind_of
from lora_kit.layers.saved_module import SavedModule
from lora_kit.layers.token_embedding import TOKEN_EMBEDDINGS, TokenTable
from lora_kit.targets.coverage import find_shortest_names
from lora_kit.targets.fingerprint import fingerprint
from lora_kit.targets.token_rows import path_of


def snapshot_adapter(resident: LoadedAdapter, layers: WrappedLayers, model: nn.Module) -> Adapter:
    """A copy of a trainable adapter as it stands."""
    config = make_plain_config(_resolve_config(resident, layers, model))
    with torch.no_grad():
        live = convert_to_saved(_collect_tensors(resident, layers), _collect_initial_weights(resident, layers))
        tensors = {key: tensor.to("cpu", copy=True).contiguous() for key, tensor in live.items()}
    return Adapter(
        config, tensors, record={"base": fingerprint_model(model)} | describe_initialization(resident.config)
    )


def restore_adapter(name: str, resident: LoadedAdapter, layers: WrappedLayers, adapter: Adapter) -> None:
    """Copy an adapter's values into a trainable one, leaf by leaf.

    Raises:
        AdapterError: the two do not hold the same tensors; nothing is copied.
    """
    leaves, given = (
        _collect_tensors(resident, layers),
        convert_to_trained(adapter.tensors, _collect_initial_weights(resident, layers)),
    )
    told = [f"{key} is missing" for key in leaves.keys() - given.keys()]
    told += [f"{key} is not expected" for key in given.keys() - leaves.keys()]
    common = leaves.keys() & given.keys()
    told += [
        f"{key} is {tuple(given[key].shape)}, {tuple(leaves[key].shape)} is expected"
        for key in common
        if given[key].shape != leaves[key].shape
    ]
    for path, held in adapter.tokens().items():
        own = next((target.indices for target in resident.coverage.tokens if target.path == path), held.indices)
        if own != held.indices:
            told.append(f"{path} has rows of other tokens")
    if told:
        raise AdapterError(f"this adapter does not fit {name!r}:\n  " + "\n  ".join(sorted(told)))
    with torch.no_grad():
        for key, leaf in leaves.items():
            leaf.copy_(given[key])


def fingerprint_model(model: nn.Module) -> dict[str, Any]:
    """The fingerprint of a bank's model."""
    return fingerprint(model, name=_name_of(model))


def _collect_tensors(resident: LoadedAdapter, layers: WrappedLayers) -> dict[str, Tensor]:
    """An adapter's live tensors by PEFT's keys."""
    tensors: dict[str, Tensor] = {}
    keys = {target.path: target.key for target in resident.coverage.targets}
    for path in resident.layers:
        layer, held = layers[path], layers.entry(path, resident.slot).tensors
        if isinstance(layer, TokenTable):
            tensors[token_embeddings_key(path_of(path))] = held[TOKEN_EMBEDDINGS]
        elif isinstance(layer, SavedModule):
            tensors |= {f"{PREFIX}{path}.{key}": tensor for key, tensor in held.items()}
        else:
            key_a, key_b = lora_weight_keys(keys[path], kind_of(layer) or "linear")
            tensors[key_a], tensors[key_b] = held[A], held[B]
            if MAGNITUDE in held:
                tensors[magnitude_key(path)] = held[MAGNITUDE]
    return tensors


def _collect_initial_weights(
    resident: LoadedAdapter, layers: WrappedLayers
) -> Mapping[tuple[str, str], tuple[Tensor, Tensor]]:
    """Where an adapter's pairs began, by PEFT's keys of A and B; empty for one that begins at zero."""
    begun = [target for target in resident.coverage.targets if target.starts_from_weight]
    held = {lora_weight_keys(t.key, t.kind): layers.entry(t.path, resident.slot).tensors for t in begun}
    return {keys: (tensors[INITIAL_A], tensors[INITIAL_B]) for keys, tensors in held.items()}


def _resolve_config(resident: LoadedAdapter, layers: WrappedLayers, model: nn.Module) -> LoraConfig:
    """The config as it is saved: names instead of `all-linear`, and the base it belongs to."""
    config = resident.config
    everything = config.target_modules == ALL_LINEAR
    conv1d = any(type(layers[path].base_layer).__name__ == "Conv1D" for path in resident.layers)
    name, revision = split_revision(config.base_model_name_or_path or _name_of(model) or "")
    return dataclasses.replace(
        config,
        target_modules=find_shortest_names(model, resident.coverage) if everything else config.target_modules,
        fan_in_fan_out=config.fan_in_fan_out or conv1d,
        base_model_name_or_path=name or None,
        revision=revision or config.revision,
        inference_mode=True,
    )


def _name_of(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None
