"""Adapters whose pairs start from the weights of their layers, as the plain adapters that they are saved as.

A pair of rank r that started at A₀ and B₀ is saved as one of rank 2r, which any reader of LoRA adds to the base as it
is; see `lora_kit.layers.starts`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lora_kit.config import LoraConfig
from lora_kit.errors import AdapterError
from lora_kit.layers.starts import joined, parted

Starts = Mapping[tuple[str, str], tuple[Tensor, Tensor]]
"""A₀ and B₀ of pairs, by the keys of their A and B in an adapter's file."""


def plain(config: LoraConfig) -> LoraConfig:
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


def beginning(config: LoraConfig) -> dict[str, Any]:
    """What a record says of how an adapter began, where its tensors and its config do not."""
    if not config.starts_from_weight:
        return {}
    return {"start": {"init_lora_weights": config.init_lora_weights, "r": config.r, "lora_alpha": config.lora_alpha}}


def saved(tensors: Mapping[str, Tensor], starts: Starts) -> dict[str, Tensor]:
    """Trained tensors as they are saved, by PEFT's keys."""
    pairs = {keys: joined(tensors[keys[0]], tensors[keys[1]], *start) for keys, start in starts.items()}
    return {**tensors, **{key: t for keys, pair in pairs.items() for key, t in zip(keys, pair, strict=True)}}


def trained(tensors: Mapping[str, Tensor], starts: Starts) -> dict[str, Tensor]:
    """Saved tensors as they are trained, bit for bit.

    Raises:
        AdapterError: a pair did not begin at its start, so there is nothing of rank r that it is.
    """
    found = dict(tensors)
    for keys, start in starts.items():
        if found.keys() >= set(keys):
            pair = parted(found[keys[0]], found[keys[1]], *start)
            if pair is None:
                raise AdapterError(
                    f"{keys[0]} and its lora_B did not start where those do that they are to be restored into",
                    hint="add an adapter of this one's own config, and restore it there",
                )
            found[keys[0]], found[keys[1]] = pair
    return found
