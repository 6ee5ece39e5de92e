"""Configs whose modules have other names in the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lora_kit.config.lora_config import LoraConfig


def rename_config_paths(config: LoraConfig, paths: Mapping[str, str]) -> LoraConfig:
    """Return a config that covers the same modules under new names, each with the rank and the alpha that it had.

    Args:
        paths: the new path of each module with LoRA weights, by its old one. They are written in full, so that they
            match no other module.
    """
    ranks = {new: config.rank_of(old) for old, new in paths.items()}
    alphas = {new: config.alpha_of(old) for old, new in paths.items()}
    return dataclasses.replace(
        config,
        target_modules=tuple(sorted(paths.values())),
        rank_pattern={path: rank for path, rank in ranks.items() if rank != config.r},
        alpha_pattern={path: alpha for path, alpha in alphas.items() if alpha != config.lora_alpha},
        layers_to_transform=None,
        layers_pattern=None,
        exclude_modules=None,
    )
