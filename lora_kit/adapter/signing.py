"""Sign an adapter's folder with a private key, and verify who made it with the public one.

OpenSSF's model-signing does it (https://github.com/sigstore/model-transparency): a Sigstore bundle over the sha256 of
every file in the folder, signed with an elliptic curve key. The network is not used.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Final, TypeVar

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_location import resolve_folder
from lora_kit.errors import AdapterError, ConfigError, StorageError, VerificationError
from lora_kit.io.atomic_write import stage_file
from lora_kit.io.read import exists
from lora_kit.io.text import escape_text

_T = TypeVar("_T")

SIGNATURE: Final = "model.sig"
_BAD_FILE: Final = re.compile(r"Hash mismatch for \\?'(.+?)\\?':")
_OTHER_FILES: Final = re.compile(r"((?:Extra|Missing) files) .+?: ([^\"\]]+)")


def sign(folder: str | Path, *, key: str | Path, replace: bool = False) -> Path:
    """Sign an adapter's folder as it is now; it is loaded first, so that nothing damaged is signed.

    Args:
        folder: of the adapter, or its name, as in `Adapter.load`.
        key: a private elliptic curve key in a PEM file, without a password.
        replace: a signature that is there already may be replaced.

    Returns:
        The signature: `model.sig` in the folder.

    Raises:
        AdapterError: the adapter cannot be read.
        ConfigError: its config or the key cannot be read, or model-signing is not installed.
        StorageError: there is a signature already, or it cannot be written.
    """
    folder, library = resolve_folder(folder).resolve(), _import_model_signing()
    Adapter.load(folder)
    target = folder / SIGNATURE
    if exists(target) and not replace:
        raise StorageError(f"{escape_text(folder)} is signed already", hint="replace the signature with --replace")
    with stage_file(target) as staging:
        hashing = _build_hashing_config(library, target, staging)
        config = library.signing.Config().set_hashing_config(hashing)
        _apply_key(config.use_elliptic_key_signer, key, private_key=Path(key)).sign(folder, staging)
    return target


def verify(folder: str | Path, *, key: str | Path) -> Adapter:
    """Check that an adapter's folder is, file by file, what the owner of a key signed.

    Args:
        folder: of the adapter, or its name, as in `Adapter.load`; with `model.sig` in it.
        key: the public key in a PEM file.

    Returns:
        The adapter, loaded after the check.

    Raises:
        AdapterError: there is no signature, or the adapter cannot be read.
        ConfigError: the key cannot be read, or model-signing is not installed.
        VerificationError: it is the signature of another key, or is damaged; or a file was changed, removed or added.
    """
    folder, library = resolve_folder(folder).resolve(), _import_model_signing()
    if not exists(folder / SIGNATURE):
        raise AdapterError(f"{escape_text(folder)} is not signed", hint=f"there is no {SIGNATURE} in it")
    config = library.verifying.Config().set_hashing_config(_build_hashing_config(library, folder / SIGNATURE))
    checker = _apply_key(config.use_elliptic_key_verifier, key, public_key=Path(key))
    try:
        checker.verify(folder, folder / SIGNATURE)
    except Exception as error:  # a signature may be made to break the library; it then is not valid
        raise VerificationError(
            f"{escape_text(folder)} is not what the owner of this key signed: {_describe_failure(error)}",
            hint="do not use it",
        ) from error
    return Adapter.load(folder)


def _build_hashing_config(library: ModuleType, *signatures: Path) -> object:
    """Configure hashing of every file in a folder but its signature, files that begin with a dot included."""
    return library.hashing.Config().set_ignored_paths(paths=signatures, ignore_git_paths=False)


def _apply_key(use: Callable[..., _T], key: str | Path, **named: Path) -> _T:
    """Call a function of the library with a key, and translate its errors."""
    try:
        return use(**named)
    except OSError as error:
        raise ConfigError(f"the key {escape_text(key)} cannot be read: {error.strerror}") from error
    except Exception as error:  # of whatever library reads the key
        (kind,) = (name.replace("_", " ") for name in named)
        raise ConfigError(
            f"{escape_text(key)} is not a {kind} that can be used here ({type(error).__name__})",
            hint="an elliptic curve key in PEM form, without a password",
        ) from error


def _describe_failure(error: Exception) -> str:
    text = str(error)
    changed = [f"{name} was changed" for name in _BAD_FILE.findall(text)]
    others = [f"{kind.lower()}: {names}" for kind, names in _OTHER_FILES.findall(text)]
    return escape_text("; ".join(changed + others) or text.partition("\n")[0][:200] or type(error).__name__)


def _import_model_signing() -> ModuleType:
    try:
        import model_signing
    except ImportError as error:
        raise ConfigError(
            f"model-signing cannot be imported ({escape_text(error)})", hint="pip install 'lora-kit[sign]'"
        ) from None
    return model_signing
