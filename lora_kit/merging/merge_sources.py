"""The adapters that a merge was asked for: as folders or values, each with its weight."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_like import AdapterLike, short_label_of
from lora_kit.adapter.adapter_location import resolve_folder
from lora_kit.adapter.folder import ALLOWANCES
from lora_kit.errors import ConfigError
from lora_kit.merging.planned_tensors import WeightedAdapter


def resolve_sources(
    adapter: AdapterLike | Sequence[tuple[AdapterLike, float]],
) -> list[tuple[Path | Adapter, float]]:
    """Return every adapter, as a folder or a value, with its weight."""
    return [
        (source if isinstance(source, Adapter) else resolve_folder(source), weight)
        for source, weight in _parse_sources(adapter)
    ]


def _parse_sources(
    adapter: AdapterLike | Sequence[tuple[AdapterLike, float]],
) -> list[tuple[AdapterLike, float]]:
    """Return every adapter with its weight.

    Raises:
        ConfigError: the argument is neither an adapter nor a list of them with weights.
    """
    if isinstance(adapter, (str, Path, Adapter)):
        return [(adapter, 1.0)]
    try:
        sources = [(source, float(weight)) for source, weight in adapter]
    except (TypeError, ValueError):
        sources = []
    valid = all(
        isinstance(source, (str, Path, Adapter)) and math.isfinite(weight) and weight for source, weight in sources
    )
    if not sources or not valid:
        raise ConfigError("an adapter, or a list of (adapter, weight) with finite weights that are not 0, was expected")
    return sources


def load_weighted_adapter(source: Path | Adapter, weight: float, *, allow: Collection[str]) -> WeightedAdapter:
    allow = [name for name in allow if name in ALLOWANCES]
    adapter = source if isinstance(source, Adapter) else Adapter.load(source, allow=allow)
    return WeightedAdapter(short_label_of(source, adapter), adapter, weight)
