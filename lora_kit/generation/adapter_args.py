"""Adapters as people give them, read, each with a label and the task it was made for."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_location import label_adapter_folder, resolve_adapter
from lora_kit.errors import AdapterError, ConfigError
from lora_kit.models.loading import Base
from lora_kit.models.tasks import find_task_by_peft_type

logger = logging.getLogger(__name__)

BASE_ROW: Final = "base"
"""What the row of the base itself is called."""

AdapterSource = str | Path | Adapter | None
"""A folder, a name in the store, an id of the hub, an Adapter, or None for the base itself."""


def read_adapter(given: AdapterSource, *, store: str | Path, allow: Collection[str] = ()) -> Adapter | None:
    """Return the adapter that is meant, read strictly; None for the base.

    Args:
        allow: as in `Adapter.load`.

    Raises:
        UnknownAdapterError: it is not there.
        AdapterError, ConfigError: it cannot be read.
    """
    if given is None or isinstance(given, Adapter):
        return given
    return Adapter.load(resolve_adapter(given, store=store).folder, allow=allow)


def labels_of(given: Sequence[AdapterSource], values: Sequence[Adapter | None]) -> list[str]:
    """A short label for each: the folder's name where that is unique, else with a part of the digest."""
    digests: dict[str, set[str]] = {}
    short = [_short_label_of(item, value) for item, value in zip(given, values, strict=True)]
    for label, value in zip(short, values, strict=True):
        digests.setdefault(label, set()).add(value.digest if value else "")
    return [
        label if len(digests[label]) == 1 or value is None else f"{label}@{value.digest[:12]}"
        for label, value in zip(short, values, strict=True)
    ]


def _short_label_of(given: AdapterSource, value: Adapter | None) -> str:
    if value is None:
        return BASE_ROW
    return value.digest[:12] if isinstance(given, Adapter) or given is None else label_adapter_folder(given)


def task_of(labels: Sequence[str], values: Sequence[Adapter | None]) -> str | None:
    """The task that adapters were made for; None where none of them says.

    Raises:
        AdapterError: they were made for different ones, or for one that is not known.
    """
    tasks: dict[str, str] = {}
    for label, value in zip(labels, values, strict=True):
        kind = None if value is None else value.config.task_type
        if kind is None:
            continue
        spec = find_task_by_peft_type(kind)
        if spec is None:
            raise AdapterError(f"adapter {label!r} was made for {kind}, which is no task of lora-kit")
        tasks.setdefault(spec.name, label)
    if len(tasks) > 1:
        told = ", ".join(f"{label!r} for {task}" for task, label in tasks.items())
        raise AdapterError(f"adapters of different tasks: {told}", hint="take those of one task together")
    return next(iter(tasks), None)


def check_quantize(
    base: str | Base, labels: Sequence[str], values: Sequence[Adapter | None], quantize: str | None
) -> None:
    """Refuse to quantise a base that is loaded already, and say which adapters were trained on one in another form."""
    if not isinstance(base, str):
        if quantize is not None:
            raise ConfigError("quantize does nothing for a base that is loaded already", hint="load it so")
        return
    for label, value in zip(labels, values, strict=True):
        recipe = value.record.get("recipe") if value is not None else None
        trained = recipe.get("quantize") if isinstance(recipe, Mapping) else quantize
        if trained != quantize:
            told = "%s was trained on its base %s, which is loaded %s here"
            logger.warning(told, label, *(f"in {form}" if form else "as it is" for form in (trained, quantize)))
