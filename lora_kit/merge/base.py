"""Where a base's files are: a local folder, the one that comes with the package, or the hub's cache."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from lora_kit.errors import BaseModelError
from lora_kit.files import printable
from lora_kit.models import KIT_BASE, KIT_FOLDER, check_config, quiet

_WANTED: Final = [
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
_OLDER: Final = ["pytorch_model*"]


def local_folder(base: str | Path) -> Path | None:
    """The folder a base is read from, where it is a local one."""
    folder = KIT_FOLDER if base == KIT_BASE else Path(base).expanduser()
    return folder if folder.is_dir() else None


def find_base(base: str | Path) -> Path:
    """The folder with a base's files; those of a hub id are fetched.

    Raises:
        BaseModelError: there is no such base, it is none, or it cannot be fetched.
    """
    folder = local_folder(base) or _fetched(base)
    if (folder / "adapter_config.json").exists():
        raise BaseModelError(f"{printable(base)} is an adapter, not a base", hint="give it as the adapter")
    if not (folder / "config.json").is_file():
        raise BaseModelError(
            f"{printable(base)} has no config.json", hint="a base is a folder as save_pretrained writes it"
        )
    check_config(folder / "config.json")
    return folder


def _fetched(base: str | Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        with quiet():
            folder = Path(snapshot_download(str(base), allow_patterns=_WANTED))
            if not any(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(str(base), allow_patterns=[*_WANTED, *_OLDER]))
    except HFValidationError:
        raise BaseModelError(
            f"{printable(base)}: no such folder", hint="give a folder, a hub id, or kit-base"
        ) from None
    except Exception as error:  # any failure of the network, of whatever library it comes from
        raise BaseModelError(
            f"{printable(base)}: no such folder here, and the hub did not give it ({type(error).__name__})",
            hint="give a local folder, or kit-base, which needs no network",
        ) from error
    return folder
