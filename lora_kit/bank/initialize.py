"""What a trainable adapter begins with, and the plain adapter that one started from the weights is saved as."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_kit.bank.model_layers import WrappedLayers
from lora_kit.bank.residents import LoadedAdapter, LoadedAdapters
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import AdapterError
from lora_kit.layers.initialization import (
    MAGNITUDE,
    A,
    B,
    WeightInitializer,
    initialize_lora,
    join_initialization,
    split_initialization,
)
from lora_kit.layers.linear import LoraLinear
from lora_kit.layers.token_embedding import TOKEN_EMBEDDINGS, TOKEN_INDICES, TokenTable
from lora_kit.ops.dora import dora_scale
from lora_kit.targets.coverage import LayerTarget


def initialize_adapter(resident: LoadedAdapter, residents: LoadedAdapters, layers: WrappedLayers) -> None:
    """Fill a resident's slot with what leaves the base's outputs as they are, and make it trainable."""
    config, coverage = resident.config, resident.coverage
    starts = WeightInitializer(config.init_lora_weights, len(coverage.targets))
    for target in coverage.targets:
        residents.put(resident, target.path, _make_lora_weights(target, config, starts, layers), target.scaling)
    for path in coverage.saved:
        residents.put(resident, path, layers[path].base_layer.state_dict(), 1.0)
    for rows in coverage.tokens:
        table = layers[rows.key]
        assert isinstance(table, TokenTable)
        indices = torch.tensor(rows.indices, device=table.device)
        residents.put(
            resident, rows.key, {TOKEN_EMBEDDINGS: table.get_base_embeddings(indices), TOKEN_INDICES: indices}, 1.0
        )
    for path in resident.layers:
        resident.leaves += layers[path].make_trainable(resident.slot, config.lora_dropout)


def _make_lora_weights(
    target: LayerTarget, config: LoraConfig, starts: WeightInitializer, layers: WrappedLayers
) -> dict[str, Tensor]:
    layer = layers[target.path]
    a, b = (torch.zeros(shape, device=layer.device) for shape in target.shapes)
    if target.starts_from_weight:
        return {A: a, B: b} | starts.of(target.path, layer.base_layer, rank=target.rank, scaling=target.scaling)
    initialize_lora(a, b, kind=target.kind, init=config.init_lora_weights)
    if not target.dora:
        return {A: a, B: b}
    assert isinstance(layer, LoraLinear)
    ones = torch.ones(target.out_features, device=layer.device)
    # The lengths a DoRA starts from, which leave the weight as it is.
    return {A: a, B: b, MAGNITUDE: 1 / dora_scale(layer.weight_matrix(), a, b, target.scaling, ones)}


InitialWeights = Mapping[tuple[str, str], tuple[Tensor, Tensor]]
"""A₀ and B₀ of pairs, by the keys of their A and B in an adapter's file."""


def make_plain_config(config: LoraConfig) -> LoraConfig:
    """The config an adapter is saved with: where its pairs had a start, of twice the rank with the same scaling."""
    if not config.starts_from_weight:
        return config
    more = math.sqrt(2) if config.use_rslora else 2
    return dataclasses.replace(
        config,
        r=2 * config.r,
        lora_alpha=config.lora_alpha * more,
        rank_pattern={name: 2 * rank for name, rank in config.rank_pattern.items()},
        alpha_pattern={name: alpha * more for name, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
    )


def describe_initialization(config: LoraConfig) -> dict[str, Any]:
    """What a record says of how an adapter began, where its tensors and its config do not."""
    if not config.starts_from_weight:
        return {}
    return {"start": {"init_lora_weights": config.init_lora_weights, "r": config.r, "lora_alpha": config.lora_alpha}}


def convert_to_saved(tensors: Mapping[str, Tensor], starts: InitialWeights) -> dict[str, Tensor]:
    """Trained tensors as they are saved, by PEFT's keys."""
    pairs = {keys: join_initialization(tensors[keys[0]], tensors[keys[1]], *start) for keys, start in starts.items()}
    return {**tensors, **{key: t for keys, pair in pairs.items() for key, t in zip(keys, pair, strict=True)}}


def convert_to_trained(tensors: Mapping[str, Tensor], starts: InitialWeights) -> dict[str, Tensor]:
    """Saved tensors as they are trained, bit for bit.

    Raises:
        AdapterError: a pair did not begin at its start, so there is nothing of rank r that it is.
    """
    found = dict(tensors)
    for keys, start in starts.items():
        if found.keys() >= set(keys):
            pair = split_initialization(found[keys[0]], found[keys[1]], *start)
            if pair is None:
                raise AdapterError(
                    f"{keys[0]} and its lora_B did not start where those do that they are to be restored into",
                    hint="add an adapter of this one's own config, and restore it there",
                )
            found[keys[0]], found[keys[1]] = pair
    return found
