"""A tiny model of a class of transformers with random weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Final

import torch

from tools.scan_models.shrink_config import iterate_configs, iterate_parts

MAX_PARAMETERS: Final = 80_000_000


def iterate_tiny_models(kind: Any) -> Iterator[Any]:
    """Yield tiny models of a class to try, always with the same weights, smaller ones first.

    Raises:
        Exception: what its configs or its constructor raised, where there is no model at all.
    """
    problems, seen, count = [], set(), 0
    for make in iterate_configs(kind):
        try:
            config = make()
            if (text := config.to_json_string()) in seen:
                continue
            seen.add(text)
            model = _build(kind, config)
        except Exception as error:
            problems.append(error)
        else:
            count += 1
            yield model
    if not count:
        raise problems[0]


def _build(kind: Any, config: Any) -> Any:
    size = _count_parameters(kind, copy.deepcopy(config))
    if size > MAX_PARAMETERS:
        raise ValueError(f"its smallest config has {size:,} parameters")
    for each in (config, *iterate_parts(config)):
        each.use_cache = False
        if getattr(each, "pad_token_id", 0) is None:
            each.pad_token_id = 0  # classifiers of text want one
    torch.manual_seed(0)
    return kind(config).float()


def _count_parameters(kind: Any, config: Any) -> int:
    """Return how many there will be; 0 where that is not known, because the constructor reads values of tensors."""
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in kind(config).parameters())
    except (RuntimeError, NotImplementedError):
        return 0
