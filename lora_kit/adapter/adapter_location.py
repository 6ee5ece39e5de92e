"""Find the folder of an adapter by a path, a name in the store, or a hub id."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from lora_kit.adapter.adapter_files import (
    CARD,
    CONFIG,
    OLD_WEIGHTS,
    WEIGHTS,
    has_adapter_files,
    list_adapter_subfolders,
)
from lora_kit.adapter.adapter_record import RECORD
from lora_kit.errors import AdapterError, ConfigError, UnknownAdapterError, format_list, suggest_nearest
from lora_kit.io.hub import (
    HubError,
    HubId,
    HubUnreachableError,
    download_snapshot,
    list_cached_files,
    list_cached_revisions,
    list_hub_files,
    may_be_hub_id,
)
from lora_kit.io.read import folder_exists
from lora_kit.io.text import escape_text, format_value
from lora_kit.names import DEFAULT_STORE, SHIPPED_ADAPTERS

logger = logging.getLogger(__name__)

_FILES: Final = (CONFIG, WEIGHTS, RECORD, CARD)
_FORMS: Final = "a folder, a name in the store, or a hub id such as organization/name or organization/name@revision"


@dataclass(frozen=True)
class AdapterLocation:
    """Where an adapter is.

    Attributes:
        folder: with its files; one of the hub is in the local cache.
        origin: `path`, `store` or `hub`: what it was found as.
    """

    folder: Path
    origin: Literal["path", "store", "hub"]


def resolve_adapter(adapter: str | Path, *, store: str | Path = DEFAULT_STORE) -> AdapterLocation:
    """Return where an adapter is.

    A path wins over a name in the store, and both over an id of the hub. Only a folder without an adapter gives way to
    an adapter of that name in the store. A `Path` is never an id of the hub.

    Args:
        adapter: a path (`adapters/sql`, `run/checkpoint-200`), a name in the store (`sql`, `sql/checkpoint-200`), or a
            hub id (`organization/name`), with `/subfolder` and `@revision` where they are needed.
        store: where names are looked up.

    Raises:
        UnknownAdapterError: there is no such adapter; the hint names the nearest one.
        AdapterError: the repository of the hub cannot be read, or holds no adapter.
        ConfigError: `adapter` is neither text nor a path.
    """
    if not isinstance(adapter, (str, os.PathLike)):
        raise ConfigError(f"{format_value(adapter)} was given as an adapter", hint=_FORMS)
    path, store = Path(adapter).expanduser(), Path(store)
    named = _find_in_store(str(adapter), store)
    if str(adapter) and folder_exists(path) and (named is None or has_adapter_files(path)):
        if named is not None and not path.samefile(named):
            logger.warning("%s is a folder here and an adapter in the store: the folder is taken", escape_text(path))
        return AdapterLocation(path, "path")
    if named is not None:
        return AdapterLocation(named, "store")
    hub_id = HubId.parse(str(adapter)) if may_be_hub_id(adapter) else None
    if hub_id is not None and "/" in hub_id.repository:
        return AdapterLocation(_fetch_adapter(str(adapter), hub_id, store), "hub")
    raise _make_unknown_error(adapter, store)


def resolve_folder(adapter: str | Path) -> Path:
    """Return the folder of an adapter: a `Path` as it is, text as `resolve_adapter` finds it.

    Raises:
        AdapterError: there is no such adapter.
        ConfigError: `adapter` is neither text nor a path.
    """
    if isinstance(adapter, Path):
        return adapter
    try:
        return resolve_adapter(adapter).folder
    except UnknownAdapterError as error:
        raise AdapterError(f"{escape_text(adapter)} is not a folder: {error.message}", hint=error.hint) from None


def label_adapter_folder(folder: str | Path) -> str:
    """Return the short name of an adapter folder: its own, or its repository's where it is in the hub's cache."""
    real = Path(folder).resolve()
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        return real.parent.parent.name.rpartition("--")[2]
    return real.name


def _make_unknown_error(adapter: str | Path, store: Path, *, reason: str = "") -> UnknownAdapterError:
    """Return the error for an adapter that does not exist, with the nearest name as its hint.

    Args:
        reason: why the hub has none either; empty where the hub was not asked.
    """
    path = Path(adapter)
    in_store = [folder.name for folder in list_adapter_subfolders(store)]
    beside = [str(folder) for folder in list_adapter_subfolders(path.parent)] if len(path.parts) > 1 else []
    if len(path.parts) > 1 and not path.is_absolute() and ".." not in path.parts:
        beside += [str(folder.relative_to(store)) for folder in list_adapter_subfolders(store / path.parent)]
    error = UnknownAdapterError(str(adapter), in_store)
    if reason:
        error.message += f": no such folder here, and {reason}"
    nearest = suggest_nearest(path.name, in_store) or suggest_nearest(str(path), beside)
    if str(adapter) in SHIPPED_ADAPTERS:
        error.hint = f"it comes with the package: lora-kit demo --adapters {shlex.quote(str(store))} writes it there"
        return error
    error.hint = nearest or f"{_FORMS}; {path.parent if beside else store} holds {format_list(beside or in_store)}"
    return error


def _find_in_store(name: str, store: Path) -> Path | None:
    """Return the folder of a name in the store, or of a folder below one (`sql/checkpoint-200`), if it exists."""
    path = Path(name)
    inside = name not in ("", ".") and not path.is_absolute() and ".." not in path.parts
    return store / path if inside and has_adapter_files(store / path) else None


def _fetch_adapter(name: str, hub_id: HubId, store: Path) -> Path:
    """Return the folder in the cache of an adapter of the hub, which is downloaded where the hub can be reached.

    Raises:
        UnknownAdapterError: the hub and the cache have no such repository.
        AdapterError: it holds no adapter there, or the download failed.
    """
    try:
        files, from_cache = list_hub_files(hub_id), False
    except HubUnreachableError as error:
        files, from_cache = list_cached_files(hub_id), True
        if not files:
            raise _make_uncached_error(name, hub_id, store, str(error)) from None
        logger.info("%s: read from the local cache, since %s", name, error)
    except HubError as error:
        raise _make_unknown_error(name, store, reason=str(error)) from None
    if hub_id.path_of(CONFIG) not in files:
        raise AdapterError(f"{name}: no {CONFIG} in this repository", hint=_hint_subfolders(hub_id, files))
    weights = () if hub_id.path_of(WEIGHTS) in files else (OLD_WEIGHTS,)
    try:
        return download_snapshot(hub_id, (*_FILES, *weights), local_files_only=from_cache)
    except HubError as error:
        raise AdapterError(f"{name}: {error}", hint="give a local folder") from error.__cause__


def _make_uncached_error(name: str, hub_id: HubId, store: Path, reason: str) -> UnknownAdapterError:
    """Return the error for what is not in the local cache, which names the revisions that are."""
    revisions = list_cached_revisions(hub_id.repository)
    if not revisions:
        return _make_unknown_error(name, store, reason=f"it is not in the local cache, and {reason}")
    known = f"the local cache has {format_list(revisions)} of {hub_id.repository}, and {reason}"
    error = _make_unknown_error(name, store, reason=known)
    error.hint = f"{hub_id.repository}@{revisions[0]}"
    revision, _, subfolder = (hub_id.revision or "").partition("/")
    if revision in revisions and subfolder:
        error.hint = f"a subfolder stands before the revision: {hub_id.repository}/{subfolder}@{revision}"
    return error


def _hint_subfolders(hub_id: HubId, files: Sequence[str]) -> str:
    """Return a hint at the subfolders of a repository that hold an adapter."""
    revision = "" if hub_id.revision is None else f"@{hub_id.revision}"
    folders = [file.removesuffix(CONFIG).rstrip("/") for file in files if file.rpartition("/")[2] == CONFIG]
    if not folders:
        return "is it an adapter? A base is given as the base"
    names = [f"{hub_id.repository}/{folder}".rstrip("/") + revision for folder in folders]
    return f"these hold one: {format_list(names)}"
