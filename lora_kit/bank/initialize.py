"""Initial values of a trainable adapter, and the plain adapter that one initialized from weights is saved as."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_kit.bank.model_layers import WrappedLayers
from lora_kit.bank.slots import LoadedAdapter, LoadedAdapters
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import AdapterError, BankError
from lora_kit.layers.initialization import (
    MAGNITUDE,
    A,
    B,
    WeightInitializer,
    initialize_lora,
    join_initialization,
    split_initialization,
)
from lora_kit.layers.introspect import is_packed
from lora_kit.layers.linear import LoraLinear
from lora_kit.layers.slot_layer import SlotLayer
from lora_kit.layers.token_embedding import TOKEN_EMBEDDINGS, TOKEN_INDICES, TokenTable
from lora_kit.ops.dora import dora_scale
from lora_kit.targets.layer_target import LayerTarget


def check_trainable(model: nn.Module, dtype: torch.dtype) -> None:
    """Check that a bank in this dtype on this base can train adapters.

    Raises:
        BankError: stacked weights are not fp32, or bitsandbytes packed the base.
    """
    if dtype != torch.float32:
        raise BankError(
            f"this bank holds {dtype} slots; trainable adapters are fp32", hint="attach with dtype=torch.float32"
        )
    if any(is_packed(module) for module in model.modules()):
        raise BankError(
            "bitsandbytes packed this base for inference on this CPU, so no gradient passes through it",
            hint="load it anew, and attach before its first inference",
        )


def initialize_adapter(loaded: LoadedAdapter, loaded_adapters: LoadedAdapters, layers: WrappedLayers) -> None:
    """Fill an adapter's slot with values that leave the base's outputs unchanged, and make it trainable."""
    config, coverage = loaded.config, loaded.coverage
    initializer = WeightInitializer(config.init_lora_weights, len(coverage.targets))
    for target in coverage.targets:
        weights = _make_lora_weights(target, config, initializer, layers[target.path])
        loaded_adapters.put(loaded, target.path, weights, target.scaling)
    for path in coverage.saved:
        loaded_adapters.put(loaded, path, layers[path].base_layer.state_dict(), 1.0)
    for token_target in coverage.tokens:
        table = layers[token_target.key]
        assert isinstance(table, TokenTable)
        indices = torch.tensor(token_target.indices, device=table.device)
        rows = {TOKEN_EMBEDDINGS: table.get_base_embeddings(indices), TOKEN_INDICES: indices}
        loaded_adapters.put(loaded, token_target.key, rows, 1.0)
    for path in loaded.layers:
        loaded.leaves += layers[path].make_trainable(loaded.slot, config.lora_dropout)


def _make_lora_weights(
    target: LayerTarget, config: LoraConfig, initializer: WeightInitializer, layer: SlotLayer
) -> dict[str, Tensor]:
    a, b = (torch.zeros(shape, device=layer.device) for shape in target.shapes)
    if target.starts_from_weight:
        module, rank, scaling = layer.base_layer, target.rank, target.scaling
        return {A: a, B: b} | initializer.compute(target.path, module, rank=rank, scaling=scaling)
    initialize_lora(a, b, kind=target.kind, init=config.init_lora_weights)
    if not target.dora:
        return {A: a, B: b}
    assert isinstance(layer, LoraLinear)
    ones = torch.ones(target.out_features, device=layer.device)
    # Magnitudes that leave the weight unchanged: its norms.
    return {A: a, B: b, MAGNITUDE: 1 / dora_scale(layer.weight_matrix(), a, b, target.scaling, ones)}


InitialWeights = Mapping[tuple[str, str], tuple[Tensor, Tensor]]
"""A₀ and B₀ of layers, by the keys of their A and B in an adapter's file."""


def make_plain_config(config: LoraConfig) -> LoraConfig:
    """Return the config an adapter is saved with: of twice the rank if it was initialized from weights.

    The scaling stays the same.

    Raises:
        ConfigError: that config would be invalid.
    """
    if not config.starts_from_weight:
        return config
    factor = math.sqrt(2) if config.use_rslora else 2
    return dataclasses.replace(
        config,
        r=2 * config.r,
        lora_alpha=config.lora_alpha * factor,
        rank_pattern={name: 2 * rank for name, rank in config.rank_pattern.items()},
        alpha_pattern={name: alpha * factor for name, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
    )


def describe_initialization(config: LoraConfig) -> dict[str, object]:
    """Return the entries of a record about an initialization that tensors and config do not show."""
    if not config.starts_from_weight:
        return {}
    return {"start": {"init_lora_weights": config.init_lora_weights, "r": config.r, "lora_alpha": config.lora_alpha}}


def convert_to_saved(tensors: Mapping[str, Tensor], initial: InitialWeights) -> dict[str, Tensor]:
    """Return trained tensors as they are saved, by PEFT's keys."""
    saved = dict(tensors)
    for (key_a, key_b), weights in initial.items():
        saved[key_a], saved[key_b] = join_initialization(tensors[key_a], tensors[key_b], *weights)
    return saved


def convert_to_trained(tensors: Mapping[str, Tensor], initial: InitialWeights) -> dict[str, Tensor]:
    """Return saved tensors as they are trained, bit for bit.

    Raises:
        AdapterError: an A and B were not trained from this initialization, so they are no weights of rank r beside it.
    """
    trained = dict(tensors)
    for (key_a, key_b), weights in initial.items():
        if key_a in trained and key_b in trained:
            moved = split_initialization(trained[key_a], trained[key_b], *weights)
            if moved is None:
                raise AdapterError(
                    f"{key_a} and its lora_B were trained from another initialization than the adapter to restore into",
                    hint="add an adapter with this one's own config, and restore it there",
                )
            trained[key_a], trained[key_b] = moved
    return trained
