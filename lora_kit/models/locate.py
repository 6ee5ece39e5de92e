"""Find a base (the one in the package, a local folder, or the hub), and translate the errors of loading it."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_kit.errors import AdapterError, BaseModelError, LoraKitError, suggest_nearest
from lora_kit.io.read import read_text
from lora_kit.io.text import escape_text, format_value
from lora_kit.models.silence import silence_libraries
from lora_kit.names import KIT_BASE

logger = logging.getLogger(__name__)

KIT_FOLDER: Final = Path(__file__).parent / "kit_base"
_CONFIG: Final = "config.json"
_CONFIG_LIMIT: Final = 16 * 2**20
"""Bytes that a config may have."""
_MAX_CONFIG_COUNTS: Final = {"layers": 4096, "layer": 4096, "blocks": 4096, "labels": 2**20}
"""The largest count accepted for a field of a config, by the end of the field's name. No model has more."""
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_TIMEOUT: Final = 10
"""Seconds to wait for the hub's answer."""
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
_WHAT_A_BASE_IS: Final = "give a folder, a hub id, or kit-base"
_WITHOUT_NETWORK: Final = "give a local folder, or kit-base, which needs no network"


@dataclass(frozen=True)
class BaseSource:
    """Where a base is read from.

    Attributes:
        location: a local folder or a hub id, as `from_pretrained` takes it.
        folder: the local folder; None for a hub id.
        local_files_only: whether to keep off the network.
    """

    location: str
    folder: Path | None
    local_files_only: bool


def locate_base(base: str | Path) -> BaseSource:
    """Return where a base is; nothing but the hub's list of its files is fetched.

    Raises:
        BaseModelError: no such base, a folder that is not a base, or a hub id that cannot be reached or has no model.
    """
    folder = find_local_folder(base)
    if folder is not None:
        _check_folder(folder)
        return BaseSource(str(folder), folder, local_files_only=True)
    name, path = str(base), Path(base).expanduser()
    if path.exists():
        raise BaseModelError(f"{escape_text(name)} is a file, not a base", hint=_WHAT_A_BASE_IS)
    # `organization/model` on the hub looks like a path. It is a path if the folder before the slash exists.
    if isinstance(base, Path) or not _HUB_ID.fullmatch(name) or ("/" in name and path.parent.is_dir()):
        raise BaseModelError(f"{escape_text(name)}: no such folder", hint=_suggest_folder(path))
    return BaseSource(name, None, local_files_only=_must_read_from_cache(name))


def find_base(base: str | Path) -> Path:
    """Return the folder with a base's files; download those of a hub id.

    Raises:
        BaseModelError: as `locate_base`, or the download failed.
    """
    source = locate_base(base)
    folder = source.folder or _download_base(source)
    _check_folder(folder)
    return folder


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
    if (folder / "adapter_config.json").exists():
        raise BaseModelError(f"{escape_text(folder)} holds an adapter, not a base", hint="give it as the adapter")
    if not (folder / _CONFIG).is_file():
        hint = "a base is a folder as save_pretrained writes it"
        raise BaseModelError(f"{escape_text(folder)}: no {_CONFIG} in this folder", hint=hint)
    _check_config(folder / _CONFIG)


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


def _must_read_from_cache(name: str) -> bool:
    """Return whether a hub id must be read from the local cache, because the hub cannot be reached."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    else:
        try:
            # One request with a time limit, before any call that would retry again and again.
            info = HfApi().model_info(name, timeout=_HUB_TIMEOUT)
        except (GatedRepoError, RepositoryNotFoundError):
            message = f"{name}: the hub has no such model, or it needs a login"
            raise BaseModelError(message, hint=_suggest_folder(Path(name))) from None
        except Exception as error:  # any failure of the network, of whatever library it comes from
            reason = f"the hub did not answer ({type(error).__name__})"
        else:
            if _CONFIG not in {sibling.rfilename for sibling in info.siblings or ()}:
                raise BaseModelError(f"{name}: no {_CONFIG} in this repository", hint="an adapter is not a base")
            return False
    if not isinstance(try_to_load_from_cache(name, _CONFIG), str):
        hint = suggest_nearest(name, [KIT_BASE]) or _WITHOUT_NETWORK
        raise BaseModelError(f"{name}: no such folder here, it is not in the local cache, and {reason}", hint=hint)
    logger.info("%s: read from the local cache, since %s", name, reason)
    return True


def _download_base(source: BaseSource) -> Path:
    """Download a base from the hub; pickled weights only where it has no safetensors."""
    from huggingface_hub import snapshot_download

    def download(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(source.location, allow_patterns=patterns, local_files_only=source.local_files_only)
        )

    try:
        with silence_libraries():
            folder = download(_BASE_PATTERNS)
            return folder if any(folder.glob("*.safetensors")) else download([*_BASE_PATTERNS, *_PICKLE_PATTERNS])
    except Exception as error:  # any failure of the network, of whatever library it comes from
        raise BaseModelError(
            f"{source.location}: the download from the hub failed ({type(error).__name__})", hint=_WITHOUT_NETWORK
        ) from error


@contextlib.contextmanager
def translate_load_errors(name: str | Path) -> Iterator[None]:
    """Raise what transformers and safetensors raise in this block as one BaseModelError of one line.

    Args:
        name: of the base, for the message.
    """
    try:
        yield
    except (LoraKitError, MemoryError):
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            message = "this model asks to run code of its own, which is never done"
            raise BaseModelError(f"{escape_text(name)}: {message}") from None
        raise BaseModelError(f"{escape_text(name)}: could not be read: {_summarize_error(error)}") from error


def _summarize_error(error: Exception) -> str:
    """Return the first line of another library's message, with the next one where the first ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return escape_text(" ".join(lines[: 2 if lines[0].endswith(":") else 1]))
