"""Find a base (the one in the package, a local folder, or the hub), and translate the errors of loading it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lora_kit.errors import AdapterError, BaseModelError, LoraKitError, OutOfMemoryError, format_list, suggest_nearest
from lora_kit.io.hub import (
    HubError,
    HubId,
    HubUnreachableError,
    download_snapshot,
    is_cached,
    list_hub_files,
    may_be_hub_id,
    pin_revision,
)
from lora_kit.io.read import read_text
from lora_kit.io.text import escape_text, format_value
from lora_kit.models.silence import silence_libraries
from lora_kit.names import KIT_BASE

logger = logging.getLogger(__name__)

KIT_FOLDER: Final = Path(__file__).parent / "kit_base"
_CONFIG: Final = "config.json"
_ADAPTER_CONFIG: Final = "adapter_config.json"
_CONFIG_LIMIT: Final = 16 * 2**20
"""Bytes that a config may have."""
SIDECAR_SUFFIXES: Final = (".json", ".txt", ".jinja", ".model", ".tiktoken", ".spm", ".vocab")
"""Of the files beside the weights: config, tokenizer, chat template."""
_READ_NAMES: Final = re.compile(
    "(tokenizer|vocab|merges|added_tokens|special_tokens|generation_|chat_template|sp|sentence)"
)
"""How the names of those begin that libraries read whole. Other files, such as rows to train on, may be large."""
_FILE_LIMIT: Final = 2**30
"""Bytes that such a file may have."""
_MAX_CONFIG_COUNTS: Final = {"layers": 4096, "layer": 4096, "blocks": 4096, "labels": 2**20}
"""The largest count accepted for a field of a config, by the end of the field's name. No model has more."""
_BASE_PATTERNS: Final = [
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.vocab",
    "LICENSE*",
]
_PICKLE_PATTERNS: Final = ["pytorch_model*"]
_WHAT_A_BASE_IS: Final = "give a folder, a hub id (organization/name, or organization/name@revision), or kit-base"
_WITHOUT_NETWORK: Final = "give a local folder, or kit-base, which needs no network"


@dataclass(frozen=True)
class BaseSource:
    """Where a base is read from.

    Attributes:
        location: a local folder or a repository of the hub, as `from_pretrained` takes it.
        folder: the local folder; None for a hub id.
        local_files_only: whether to keep off the network.
        revision: of the repository; None for a local folder, and for `main`.
        subfolder: of the repository; empty for its root.
    """

    location: str
    folder: Path | None
    local_files_only: bool
    revision: str | None = None
    subfolder: str = ""

    @property
    def loading_options(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`, beside `location`; code that comes with a model is never run."""
        options: dict[str, Any] = {"local_files_only": self.local_files_only, "trust_remote_code": False}
        if self.revision is not None:
            options["revision"] = self.revision
        if self.subfolder:
            options["subfolder"] = self.subfolder
        return options


def locate_base(base: str | Path) -> BaseSource:
    """Return where a base is; nothing but the hub's list of its files is fetched.

    A folder of that name is meant first, then `kit-base`, then the hub: `organization/name`, with `/subfolder` and
    `@revision` where they are needed.

    Raises:
        BaseModelError: no such base, a folder that is not a base, or a hub id that cannot be reached or has no model.
    """
    if not isinstance(base, (str, os.PathLike)):
        raise BaseModelError(f"{format_value(base)} was given as the base", hint=_WHAT_A_BASE_IS)
    folder = find_local_folder(base)
    if folder is not None:
        _check_folder(folder)
        return BaseSource(str(folder), folder, local_files_only=True)
    name, path = str(base), Path(base).expanduser()
    if path.exists():
        raise BaseModelError(f"{escape_text(name)} is a file, not a base", hint=_WHAT_A_BASE_IS)
    hub_id = HubId.parse(name) if may_be_hub_id(base) else None
    if hub_id is None:
        raise BaseModelError(f"{escape_text(name)}: no such folder", hint=_suggest_folder(path))
    from_cache = _must_read_from_cache(name, hub_id)
    return BaseSource(hub_id.repository, None, from_cache, hub_id.revision, hub_id.subfolder)


def find_base(base: str | Path) -> Path:
    """Return the folder with a base's files; download those of a hub id.

    Raises:
        BaseModelError: as `locate_base`, or the download failed.
    """
    source = locate_base(base)
    folder = source.folder or _download_base(str(base), source)
    _check_folder(folder)
    return folder


def reason_not_here(base: str) -> str | None:
    """Return why a base cannot be read without the network; None for `kit-base`, a folder and a cached hub id."""
    folder = find_local_folder(base)
    if folder is not None:
        try:
            _check_folder(folder)
        except BaseModelError as error:
            return error.message
        return None
    hub_id = HubId.parse(base) if may_be_hub_id(base) else None
    if hub_id is None:
        return "there is no such folder"
    return None if is_cached(hub_id, _CONFIG) else "it is neither a folder here nor in the local cache"


def warn_of_floating_revision(base: str | Path) -> None:
    """Log a warning with the commit where a base is a branch of the hub, which may be another model tomorrow."""
    hub_id = HubId.parse(str(base)) if find_local_folder(base) is None and may_be_hub_id(base) else None
    pinned = None if hub_id is None else pin_revision(hub_id, _CONFIG)
    if pinned is not None:
        logger.warning("%s may be another model tomorrow; what was read now is %s", hub_id, pinned)


def find_local_folder(base: str | Path) -> Path | None:
    """Return the folder of a local base or of `kit-base`; None if it does not exist."""
    folder = KIT_FOLDER if base == KIT_BASE else Path(base).expanduser()
    return folder if folder.is_dir() else None


def _suggest_folder(path: Path) -> str:
    """Return a hint at a folder of nearly that name."""
    parent = path.parent
    folders = [str(parent / entry.name) for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    return suggest_nearest(str(path), [*folders, KIT_BASE]) or _WHAT_A_BASE_IS


def _check_folder(folder: Path) -> None:
    """Raise BaseModelError for a folder that holds an adapter, or no config that a model can be built from."""
    if (folder / _ADAPTER_CONFIG).exists():
        raise BaseModelError(f"{escape_text(folder)} holds an adapter, not a base", hint="give it as the adapter")
    if not (folder / _CONFIG).is_file():
        below = [escape_text(str(file.parent)) for file in sorted(folder.glob(f"*/{_CONFIG}"))]
        hint = f"these hold one: {format_list(below)}" if below else "a base is a folder as save_pretrained writes it"
        raise BaseModelError(f"{escape_text(folder)}: no {_CONFIG} in this folder", hint=hint)
    _check_config(folder / _CONFIG)
    for file in folder.iterdir():
        is_read = file.suffix in SIDECAR_SUFFIXES and _READ_NAMES.match(file.name) and file.is_file()
        size = file.stat().st_size if is_read else 0
        if size > _FILE_LIMIT:
            raise BaseModelError(f"{escape_text(file)} has {size:,} bytes; at most {_FILE_LIMIT:,} are expected")


def _check_config(file: Path) -> None:
    """Reject a config that transformers would fail on without a clear message, or would build a huge model from."""
    try:
        config = json.loads(read_text(file.resolve(), limit=_CONFIG_LIMIT))
    except AdapterError as error:
        raise BaseModelError(error.message, hint=error.hint) from None
    except (ValueError, RecursionError) as error:
        raise BaseModelError(f"{escape_text(file)}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise BaseModelError(f"{escape_text(file)}: a JSON object was expected, found {type(config).__name__}")
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise BaseModelError(
            f"{escape_text(file)}: architectures is {format_value(names)}; a list of names was expected"
        )
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name, value in section.items():
            limit = next((count for end, count in _MAX_CONFIG_COUNTS.items() if name.endswith(end)), None)
            if limit is not None and isinstance(value, (int, float)) and not value <= limit:
                raise BaseModelError(
                    f"{escape_text(file)}: {name} is {format_value(value)}; at most {limit:,} are built"
                )


def _must_read_from_cache(name: str, hub_id: HubId) -> bool:
    """Return whether a hub id must be read from the local cache, because the hub cannot be reached.

    Raises:
        BaseModelError: it is neither in the cache nor can it be reached, or it holds no model.
    """
    try:
        files = list_hub_files(hub_id)
    except HubUnreachableError as error:
        if not is_cached(hub_id, _CONFIG):
            hint = suggest_nearest(name, [KIT_BASE]) or _WITHOUT_NETWORK
            message = f"{name}: no such folder here, it is not in the local cache, and {error}"
            raise BaseModelError(message, hint=hint) from None
        logger.info("%s: read from the local cache, since %s", name, error)
        return True
    except HubError as error:
        raise BaseModelError(f"{name}: {error}", hint=_suggest_folder(Path(name))) from None
    if hub_id.path_of(_CONFIG) not in files:
        below = [f"{hub_id.repository}/{file.rpartition('/')[0]}" for file in files if file.endswith(f"/{_CONFIG}")]
        hint = f"these hold one: {format_list(below)}" if below else "an adapter is not a base"
        raise BaseModelError(f"{name}: no {_CONFIG} in this repository", hint=hint)
    return False


def _download_base(name: str, source: BaseSource) -> Path:
    """Download a base from the hub; pickled weights only where it has no safetensors."""
    hub_id = HubId(source.location, source.subfolder, source.revision)
    try:
        with silence_libraries():
            folder = download_snapshot(hub_id, _BASE_PATTERNS, local_files_only=source.local_files_only)
            if any(folder.glob("*.safetensors")):
                return folder
            patterns = [*_BASE_PATTERNS, *_PICKLE_PATTERNS]
            return download_snapshot(hub_id, patterns, local_files_only=source.local_files_only)
    except HubError as error:
        raise BaseModelError(f"{name}: {error}", hint=_WITHOUT_NETWORK) from error.__cause__


@contextlib.contextmanager
def translate_load_errors(name: str | Path) -> Iterator[None]:
    """Raise what transformers and safetensors raise in this block as one BaseModelError of one line.

    Args:
        name: of the base, for the message.
    """
    try:
        yield
    except LoraKitError:
        raise
    except Exception as error:
        from lora_kit.torch_utils import is_out_of_memory  # with torch, which looking for a base does not need

        if isinstance(error, MemoryError) or is_out_of_memory(error):
            hint = "quantize: nf4, or a dtype of two bytes"
            raise OutOfMemoryError(f"{escape_text(name)} does not fit in memory", hint=hint) from error
        if "trust_remote_code" in str(error):
            message = "this model asks to run code of its own, which is never done"
            hint = "bases are models of a kind that transformers itself has"
            raise BaseModelError(f"{escape_text(name)}: {message}", hint=hint) from None
        raise BaseModelError(f"{escape_text(name)}: could not be read: {_summarize_error(error)}") from error


def _summarize_error(error: Exception) -> str:
    """Return the first line of another library's message, with the next one where the first ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return escape_text(" ".join(lines[: 2 if lines[0].endswith(":") else 1]))
