"""The adapter store: list the adapters of a folder, find one by what it is called."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lora_kit.adapter.adapter_files import ADAPTER_FILES, CONFIG
from lora_kit.adapter.adapter_location import resolve_adapter
from lora_kit.adapter.store_index import FileTimes, StoreIndex, read_file_times
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import AdapterError, LoraKitError, VerificationError, format_list
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
        # Field by field, since a store may have thousands.
        simple = {name: getattr(self, name) for name in ("name", "rank", "alpha", "base", "bytes", "digest", "problem")}
        metrics = to_json_value(self.metrics) if self.metrics else {}
        return {**simple, "folder": str(self.folder), "targets": list(self.targets), "metrics": metrics}


def list_adapters(store: str | Path = DEFAULT_STORE, *, verify: bool = False) -> list[AdapterSummary]:
    """List the adapters of a store by name; those that cannot be loaded too, with the reason in `problem`.

    A folder is an adapter when it holds an adapter's config or weights; other folders and files are skipped. An adapter
    whose files have the sizes and times of the last time is not read again, see `lora_kit.adapter.store_index`.

    Args:
        verify: whether every byte is read, and compared with what the index says.

    Raises:
        AdapterError: the store is not a folder.
        VerificationError: with `verify`: the index was wrong about files of the same sizes and times. It is fixed.
    """
    store = Path(store)
    if not store.is_dir():
        raise AdapterError(f"{str(store)!r} is not a folder", hint="give the folder that holds one folder per adapter")
    index, summaries, wrong = StoreIndex(store), list[AdapterSummary](), list[str]()
    for name, times in _list_adapter_files(store):
        indexed = index.find(name, times)
        summary = None if indexed is None or verify else _parse_summary(store / name, indexed)
        if summary is None:
            summary = _summarize_adapter(store / name)
            entry = _build_index_entry(summary)
            if verify and indexed is not None and indexed != entry:
                wrong.append(name)
            if not summary.problem:
                index.keep(name, times, entry)
        elif indexed is not None:
            index.keep(name, times, indexed)
        summaries.append(summary)
    index.write()
    if wrong:
        what = f"the index of {store} was wrong about {format_list(wrong)}: they changed with the same sizes and times"
        raise VerificationError(what, hint="it is fixed now; list them again")
    return summaries


def _list_adapter_files(store: Path) -> list[tuple[str, FileTimes]]:
    """Return the folders of a store that are adapters, by name, with the sizes and times of their files."""
    with os.scandir(store) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir())
    folders = [(name, read_file_times(store / name)) for name in names]
    return [(name, times) for name, times in folders if not times.keys().isdisjoint(ADAPTER_FILES)]


_INDEXED_TYPES: Final[Mapping[str, type | tuple[type, ...]]] = {
    "rank": (int, type(None)),
    "alpha": (int, float, type(None)),
    "targets": list,
    "base": (str, type(None)),
    "bytes": int,
    "metrics": dict,
    "digest": str,
    "problem": str,
}
"""The fields of a summary that the index keeps, as JSON has them."""


def _build_index_entry(summary: AdapterSummary) -> JsonObject:
    """Return what the index keeps of a summary."""
    fields = summary.to_json()
    return {key: fields[key] for key in _INDEXED_TYPES}


def _parse_summary(folder: Path, entry: JsonObject) -> AdapterSummary | None:
    """Return the summary that an entry of the index describes; None where it has other fields, or other types."""
    if entry.keys() != _INDEXED_TYPES.keys():
        return None
    if not all(isinstance(entry[name], kind) for name, kind in _INDEXED_TYPES.items()):
        return None
    return AdapterSummary(name=folder.name, folder=folder, **{**entry, "targets": tuple(entry["targets"])})


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
    from lora_kit.adapter.adapter import Adapter  # which needs torch

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
