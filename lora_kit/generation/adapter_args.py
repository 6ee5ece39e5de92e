"""Adapters as arguments: read from a name, a folder or an Adapter, each with a short label and its task."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_like import AdapterLike, short_label_of
from lora_kit.adapter.adapter_location import resolve_adapter
from lora_kit.errors import AdapterError, ConfigError
from lora_kit.models.loading import Base
from lora_kit.models.tasks import describe_peft_type, find_task_by_peft_type

logger = logging.getLogger(__name__)

BASE_ROW: Final = "base"
"""The label of the base itself."""


def read_adapter(source: AdapterLike | None, *, store: str | Path, allow: Collection[str] = ()) -> Adapter | None:
    """Read an adapter strictly; return None for the base.

    Args:
        source: an adapter, or None for the base.
        store: where names are looked up.
        allow: as in `Adapter.load`.

    Raises:
        UnknownAdapterError: the adapter does not exist.
        AdapterError, ConfigError: the adapter cannot be read.
    """
    if source is None or isinstance(source, Adapter):
        return source
    return Adapter.load(resolve_adapter(source, store=store).folder, allow=allow)


def list_input_folders(
    base: str | Base, sources: Iterable[AdapterLike | None], *, store: str | Path
) -> list[str | Path]:
    """Return the folders of a base and of adapters, which no output may be in; of a base it may be an id of the hub.

    Raises:
        UnknownAdapterError, AdapterError, ConfigError: as `read_adapter`.
    """
    found: list[str | Path] = [base.name if isinstance(base, Base) else base]
    for source in sources:
        if isinstance(source, Adapter):
            found += [source.folder] if source.folder else []
        elif source is not None:
            found.append(resolve_adapter(source, store=store).folder)
    return found


def build_adapter_labels(sources: Sequence[AdapterLike | None], adapters: Sequence[Adapter | None]) -> list[str]:
    """Return a short label for each adapter: the name of its folder, with part of its digest if that is not unique."""
    labels = [_build_short_label(source, adapter) for source, adapter in zip(sources, adapters, strict=True)]
    digests: dict[str, set[str]] = {}
    for label, adapter in zip(labels, adapters, strict=True):
        digests.setdefault(label, set()).add(adapter.digest if adapter else "")
    return [
        label if len(digests[label]) == 1 or adapter is None else f"{label}@{adapter.digest[:12]}"
        for label, adapter in zip(labels, adapters, strict=True)
    ]


def _build_short_label(source: AdapterLike | None, adapter: Adapter | None) -> str:
    return BASE_ROW if source is None or adapter is None else short_label_of(source, adapter)


def find_common_task(labels: Sequence[str], adapters: Sequence[Adapter | None]) -> str | None:
    """Return the task of all adapters, or None if none of them records one.

    Raises:
        AdapterError: the adapters have different tasks, or one that is not known.
    """
    tasks: dict[str, str] = {}
    for label, adapter in zip(labels, adapters, strict=True):
        task_type = None if adapter is None else adapter.config.task_type
        if task_type is None:
            continue
        spec = find_task_by_peft_type(task_type)
        if spec is None:
            raise AdapterError(f"adapter {label!r} is for {describe_peft_type(task_type)}")
        tasks.setdefault(spec.name, label)
    if len(tasks) > 1:
        listed = ", ".join(f"{label!r} for {task}" for task, label in tasks.items())
        raise AdapterError(f"adapters of different tasks: {listed}", hint="use adapters of one task")
    return next(iter(tasks), None)


def check_quantize(
    base: str | Base, labels: Sequence[str], adapters: Sequence[Adapter | None], quantize: str | None
) -> None:
    """Check that no loaded base is to be quantized, and warn of adapters that were trained on another form of the base.

    Raises:
        ConfigError: the base is loaded already, and `quantize` is given.
    """
    if not isinstance(base, str):
        if quantize is not None:
            raise ConfigError("quantize does nothing for a base that is loaded already", hint="load it with quantize")
        return
    for label, adapter in zip(labels, adapters, strict=True):
        recipe = adapter.record.get("recipe") if adapter is not None else None
        trained = recipe.get("quantize") if isinstance(recipe, Mapping) else quantize
        if trained != quantize:
            message = "%s was trained on its base %s, which is loaded %s here"
            logger.warning(message, label, *(f"in {form}" if form else "as it is" for form in (trained, quantize)))
