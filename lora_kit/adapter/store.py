"""The adapter store: list the adapters of a folder, find one by what it is called."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_location import resolve_adapter
from lora_kit.adapter.folder import CONFIG, has_adapter_files
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import AdapterError, LoraKitError
from lora_kit.io.strict_json import JsonObject
from lora_kit.names import DEFAULT_STORE


@dataclass(frozen=True, kw_only=True)
class AdapterSummary:
    """One adapter of a store.

    Attributes:
        name: the folder's name: a label, not an identity.
        folder: path of the adapter.
        rank: from its config; None where it has no LoRA weights or cannot be read.
        alpha: from its config, likewise.
        targets: `target_modules` and `modules_to_save` of its config; empty where it cannot be read.
        base: name of the base that its config gives.
        bytes: size of the folder's files.
        metrics: measured values from its record.
        digest: its identity; empty where it cannot be loaded.
        problem: why it cannot be loaded; empty where it can.
    """

    name: str
    folder: Path
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    base: str | None = None
    bytes: int = 0
    metrics: Mapping[str, object] = field(default_factory=dict)
    digest: str = ""
    problem: str = ""

    def to_json(self) -> JsonObject:
        """Return JSON values of every field."""
        fields: JsonObject = to_json_value(self)
        return fields


def list_adapters(store: str | Path = DEFAULT_STORE) -> list[AdapterSummary]:
    """List the adapters of a store by name; those that cannot be loaded too, with the reason in `problem`.

    A folder is an adapter when it holds an adapter's config or weights; other folders and files are skipped.

    Raises:
        AdapterError: the store is not a folder.
    """
    store = Path(store)
    if not store.is_dir():
        raise AdapterError(f"{str(store)!r} is not a folder", hint="give the folder that holds one folder per adapter")
    return [_summarize_adapter(folder) for folder in sorted(store.iterdir()) if has_adapter_files(folder)]


def find_adapter(adapter: str | Path, *, store: str | Path = DEFAULT_STORE) -> Path:
    """Return the folder of an adapter that is given as a path, by its name in the store, or as an id of the hub.

    Raises:
        UnknownAdapterError, AdapterError, ConfigError: as `lora_kit.adapter.adapter_location.resolve_adapter`.
    """
    return resolve_adapter(adapter, store=store).folder


def sum_file_sizes(folder: Path) -> int:
    """Return the bytes of the regular files directly in a folder; links are not followed."""
    return sum(entry.lstat().st_size for entry in folder.iterdir() if entry.is_file() and not entry.is_symlink())


def to_json_value(value: object) -> Any:
    """Return JSON values of dataclasses, mappings and sequences; of anything else, also NaN and infinity, its text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json_value(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json_value(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)


def _summarize_adapter(folder: Path) -> AdapterSummary:
    try:
        adapter = Adapter.load(folder)
    except (LoraKitError, OSError) as error:
        problem = error.message if isinstance(error, LoraKitError) else error.strerror or type(error).__name__
        return AdapterSummary(
            name=folder.name,
            folder=folder,
            bytes=sum_file_sizes(folder),
            problem=problem,
            **_summarize_config(_read_config_only(folder)),
        )
    metrics = adapter.record.get("metrics")
    return AdapterSummary(
        name=folder.name,
        folder=folder,
        bytes=sum_file_sizes(folder),
        digest=adapter.digest,
        metrics=metrics if isinstance(metrics, Mapping) else {},
        **_summarize_config(adapter.config),
    )


def _read_config_only(folder: Path) -> LoraConfig | None:
    """Read the config of an adapter that cannot be loaded; None where that cannot be read either."""
    file = folder / CONFIG
    try:
        if not file.is_file() or file.stat().st_size > 2**20:
            return None
        return LoraConfig.from_json(file.read_text("utf-8"))
    except (LoraKitError, OSError, ValueError):
        return None


def _summarize_config(config: LoraConfig | None) -> dict[str, Any]:
    """Return the fields of an `AdapterSummary` that a config gives."""
    if config is None:
        return {}
    targets = config.target_modules
    return {
        "rank": config.r if targets else None,
        "alpha": config.lora_alpha if targets else None,
        "targets": ((targets,) if isinstance(targets, str) else targets)
        + config.modules_to_save
        + (("trainable_token_indices",) if config.trainable_token_indices else ()),
        "base": config.base_model_name_or_path,
    }
