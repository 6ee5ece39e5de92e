"""Where a base is: the one that comes with the package, a local folder, or the hub; and the errors on the way."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lora_kit.errors import AdapterError, BaseModelError, LoraKitError, suggest_nearest
from lora_kit.io.read import read_text
from lora_kit.io.text import escape_text, format_value

logger = logging.getLogger(__name__)

_CONFIG_LIMIT: Final = 16 * 2**20
_MAX_CONFIG_COUNTS: Final = {"layers": 4096, "layer": 4096, "blocks": 4096, "labels": 2**20}
"""How many of what a config counts are more than any model has, by the ends of the fields' names."""

KIT_BASE: Final = "kit-base"
KIT_FOLDER: Final = Path(__file__).parent / "kit_base"
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def locate(base: str | Path) -> tuple[str, bool]:
    """Where to read the base from (a folder or a hub id), and whether to keep off the network."""
    if base == KIT_BASE:
        return str(KIT_FOLDER), True
    text, path = str(base), Path(base).expanduser()
    if path.is_dir():
        _check_folder(path)
        return str(path), True
    if path.exists():
        raise BaseModelError(f"{text} is a file", hint="a base is a folder, a hub id, or kit-base")
    # `organisation/model` on the hub looks like a path; it is one if the folder before the slash is here.
    if isinstance(base, Path) or not _HUB_ID.fullmatch(text) or ("/" in text and path.parent.is_dir()):
        raise BaseModelError(f"{text}: no such folder", hint=_suggest_folder(path))
    return text, _needs_local_cache(text)


def _suggest_folder(path: Path) -> str:
    """A hint at a folder of nearly that name."""
    parent = path.parent
    folders = [str(parent / entry.name) for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    return suggest_nearest(str(path), [*folders, KIT_BASE]) or "give a folder, a hub id, or kit-base"


def _check_folder(path: Path) -> None:
    if (path / "adapter_config.json").exists():
        raise BaseModelError(f"{path}: this folder holds an adapter, not a base", hint="give it as the adapter")
    if not (path / "config.json").is_file():
        hint = "a base is a folder as save_pretrained writes it"
        raise BaseModelError(f"{path}: no config.json in this folder", hint=hint)
    check_config(path / "config.json")


def check_config(file: Path) -> None:
    """Refuse a config that transformers would fail on without a word, or build a model of for ever.

    Raises:
        BaseModelError: not a JSON object, or with numbers of layers or labels that no model has.
    """
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
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name, value in part.items():
            most = next((limit for end, limit in _MAX_CONFIG_COUNTS.items() if name.endswith(end)), None)
            if most is not None and isinstance(value, (int, float)) and not value <= most:
                raise BaseModelError(
                    f"{escape_text(file)}: {name} is {format_value(value)}; at most {most:,} are built"
                )


def _needs_local_cache(name: str) -> bool:
    """Whether a hub id must be read from the local cache.

    Raises:
        BaseModelError: it is neither in the cache nor to be reached, or it holds no model.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    else:
        try:
            # One request with a time limit, before anything that would try again and again.
            info = HfApi().model_info(name, timeout=10)
        except (GatedRepoError, RepositoryNotFoundError):
            told = f"{name}: the hub has no such model, or it needs a login"
            raise BaseModelError(told, hint=_suggest_folder(Path(name))) from None
        except Exception as error:  # any failure of the network, of whatever library it comes from
            reason = f"the hub did not answer ({type(error).__name__})"
        else:
            files = {sibling.rfilename for sibling in info.siblings or ()}
            if "config.json" not in files:
                raise BaseModelError(f"{name}: no config.json in this repository", hint="an adapter is not a base")
            return False
    if not cached:
        close = suggest_nearest(name, [KIT_BASE])
        hint = close or "give a local folder, or kit-base, which needs no network"
        raise BaseModelError(f"{name}: no such folder here, it is not in the local cache, and {reason}", hint=hint)
    logger.info("%s: read from the local cache, since %s", name, reason)
    return True


@contextlib.contextmanager
def translate_load_errors(name: str) -> Iterator[None]:
    """What transformers and safetensors raise, as one typed line."""
    try:
        yield
    except LoraKitError:
        raise
    except MemoryError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise BaseModelError(f"{name}: this model asks to run code of its own, which is never done") from None
        raise BaseModelError(f"{name}: could not be read: {summarize_error(error)}") from error


def summarize_error(error: Exception) -> str:
    """The first line of an error of others, with the next one where it only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return escape_text(" ".join(lines[: 2 if lines[0].endswith(":") else 1]))


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Keeps transformers' bars and load reports, and bitsandbytes' line about `kernels`, off the terminal."""
    from transformers.utils import logging as theirs

    bars, verbosity = theirs.is_progress_bar_enabled(), theirs.get_verbosity()
    bnb = logging.getLogger("bitsandbytes")
    bnb_level = bnb.level
    theirs.disable_progress_bar()
    theirs.set_verbosity_error()
    bnb.setLevel(logging.ERROR)
    try:
        yield
    finally:
        bnb.setLevel(bnb_level)
        theirs.set_verbosity(verbosity)
        if bars:
            theirs.enable_progress_bar()


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


def find_local_folder(base: str | Path) -> Path | None:
    """The folder a base is read from, where it is a local one."""
    folder = KIT_FOLDER if base == KIT_BASE else Path(base).expanduser()
    return folder if folder.is_dir() else None


def find_base(base: str | Path) -> Path:
    """The folder with a base's files; those of a hub id are fetched.

    Raises:
        BaseModelError: there is no such base, it is none, or it cannot be fetched.
    """
    folder = find_local_folder(base) or _fetch_base(base)
    if (folder / "adapter_config.json").exists():
        raise BaseModelError(f"{escape_text(base)} is an adapter, not a base", hint="give it as the adapter")
    if not (folder / "config.json").is_file():
        raise BaseModelError(
            f"{escape_text(base)} has no config.json", hint="a base is a folder as save_pretrained writes it"
        )
    check_config(folder / "config.json")
    return folder


def _fetch_base(base: str | Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        with silence_libraries():
            folder = Path(snapshot_download(str(base), allow_patterns=_BASE_PATTERNS))
            if not any(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(str(base), allow_patterns=[*_BASE_PATTERNS, *_PICKLE_PATTERNS]))
    except HFValidationError:
        raise BaseModelError(
            f"{escape_text(base)}: no such folder", hint="give a folder, a hub id, or kit-base"
        ) from None
    except Exception as error:  # any failure of the network, of whatever library it comes from
        raise BaseModelError(
            f"{escape_text(base)}: no such folder here, and the hub did not give it ({type(error).__name__})",
            hint="give a local folder, or kit-base, which needs no network",
        ) from error
    return folder
