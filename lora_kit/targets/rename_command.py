"""The command that gives an adapter's modules the names of a model's."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Final

from torch import nn

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.conversion.formats import ConversionHints
from lora_kit.targets.match import named_layers

_MOST_RENAMES: Final = 4
"""Renames that a command in a hint has at most."""


def suggest_conversion(adapter: Adapter, model: nn.Module) -> str:
    """Return the command that renames an adapter's modules to the model's; empty where a few renames do not do it."""
    places, paths = dict(named_layers(model)), list_module_paths(adapter)
    renames = dict(filter(None, (_find_rename(path, list(places)) for path in paths if path not in places)))
    rename = ConversionHints(renames=renames).rename
    if not 0 < len(renames) <= _MOST_RENAMES or any(rename(path) not in places for path in paths):
        return ""
    folder = shlex.quote(str(adapter.folder)) if adapter.folder else "ADAPTER"
    flags = " ".join(f"--rename {shlex.quote(f'{old}={new}')}" for old, new in renames.items())
    return f"lora-kit convert {folder} {flags} --out CONVERTED"


def list_module_paths(adapter: Adapter) -> list[str]:
    """Return the paths of the modules that an adapter changes, without the marks of nested parameters."""
    saved = (key.rpartition(".")[0] for key in adapter.saved())
    weights = (path.replace(".base_layer", "") for path in adapter.all_pairs())
    return list(dict.fromkeys([*weights, *adapter.tokens(), *saved]))


def _find_rename(path: str, places: Sequence[str]) -> tuple[str, str] | None:
    """Return the beginnings of a path and of the only module of the model that has the longest equal end.

    None where several have it, or none.
    """
    parts = path.split(".")
    for start in range(len(parts)):
        end = "." + ".".join(parts[start:])
        matches = [place for place in places if f".{place}".endswith(end)]
        if len(matches) == 1:
            old, new = ".".join(parts[:start]), f".{matches[0]}"[: -len(end)].removeprefix(".")
            # A beginning to rename is never empty: the first part of the equal end goes with it.
            return (old, new) if old else (parts[0], f"{new}.{parts[0]}")
        if matches:
            return None
    return None
