"""The record of an adapter, `lora_kit.json`: digests of the other files and of itself, identity and provenance.

`adapters/README.md` describes every field. From format 3 on the record has the sha256 of its own bytes, with zeros
in the place of those 64 digits, so a single changed bit of it is seen. A record of format 2 is read, with the note that
it is unprotected.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from lora_kit.errors import AdapterError, ConfigError, VerificationError, format_list
from lora_kit.io.read import exists, has_recorded_hash, read_text
from lora_kit.io.sealed_json import NO_DIGEST, SELF_DIGEST, is_intact, seal_json
from lora_kit.io.strict_json import JsonObject, parse_object
from lora_kit.io.text import escape_text, format_value

logger = logging.getLogger(__name__)

RECORD: Final = "lora_kit.json"
RECORD_FORMAT: Final = 3
"""Version of `lora_kit.json`."""

_UNPROTECTED_FORMAT: Final = 2
_SIZE_LIMIT: Final = 16 * 2**20
_TYPES: Final[Mapping[str, type]] = {
    "base": dict,
    "checkpoint": dict,
    "files": dict,
    "frozen_layers": str,
    "labels": list,
    "metrics": dict,
    "problem": str,
    "recipe": dict,
    "text_pairs": bool,
    "thresholds": list,
    "versions": dict,
}
_KNOWN_FIELDS: Final = (
    *_TYPES,
    SELF_DIGEST,
    "converted",
    "digest",
    "format",
    "made",
    "method",
    "peft_type",
    "run",
    "seed",
    "start",
)


# Reading


def read_record(folder: Path, *, allow: Collection[str]) -> JsonObject | None:
    """Read `lora_kit.json`; None if the file does not exist.

    Args:
        folder: of the adapter.
        allow: with `changed-files`, the record is not compared with its own digest.

    Raises:
        AdapterError: it is damaged, or has a format that is not read.
    """
    if not exists(folder / RECORD):
        return None
    shown = escape_text(folder / RECORD)
    text = read_text(folder / RECORD, limit=_SIZE_LIMIT)
    try:
        record = parse_object(text)
    except ValueError as error:
        raise AdapterError(f"{shown}: {error}") from None
    if "changed-files" not in allow:
        _check_format(record, shown)
        _check_own_digest(record, text, shown)
    for name, kind in _TYPES.items():
        if not isinstance(record.get(name), (kind, type(None))):
            raise AdapterError(f"{shown}: {name} is {format_value(record[name])}; it is damaged")
    return record


def _check_format(record: JsonObject, shown: str) -> None:
    version = record.get("format")
    if isinstance(version, bool) or version not in (_UNPROTECTED_FORMAT, RECORD_FORMAT):
        raise AdapterError(
            f"{shown} has format {format_value(version)}; formats {_UNPROTECTED_FORMAT} and {RECORD_FORMAT} are read",
            hint="allow 'changed-files' to read it unchecked, and save it again",
        )


def _check_own_digest(record: JsonObject, text: str, shown: str) -> None:
    """Raise AdapterError unless a record has the digest that it says; one of format 2 says none."""
    if SELF_DIGEST not in record and record["format"] == _UNPROTECTED_FORMAT:
        return
    if not is_intact(record, text):
        raise AdapterError(f"{shown} was changed since it was saved", hint="allow 'changed-files' to go on")


def log_record_caveats(record: JsonObject, shown: str) -> None:
    """Log what a record leaves unchecked, and fields that nothing here reads.

    Args:
        shown: the adapter's folder, for messages.
    """
    if record.get("format") == _UNPROTECTED_FORMAT:
        logger.info(
            "%s/%s has format 2: a change of the record itself is not seen; save the adapter again", shown, RECORD
        )
    unknown = [escape_text(name) for name in record if name not in _KNOWN_FIELDS]
    if unknown:
        logger.warning("%s/%s: unknown fields are kept as they are: %s", shown, RECORD, format_list(unknown))


def find_changed_files(folder: Path, record: JsonObject) -> dict[str, str]:
    """Return the files of a record that are not as it says, each with what happened to it: `changed`, `missing`.

    Every file is read whole, in constant memory. Further files of the folder are not in the result.

    Raises:
        AdapterError: the record names a file outside the folder.
        StorageError: a file cannot be read.
    """
    facts: JsonObject = record.get("files") or {}
    outside = [name for name in facts if Path(name).name != name or name in ("", "..")]
    if outside:
        raise AdapterError(
            f"{escape_text(folder / RECORD)} names {format_value(outside[0])}, which is no file beside it"
        )
    changes = {name: _compare_file(folder / name, fact) for name, fact in facts.items()}
    return {name: change for name, change in changes.items() if change}


def check_files(folder: Path, record: JsonObject) -> int:
    """Return how many files a record lists, all of which are as they were saved.

    Raises:
        VerificationError: some were changed or are missing; names each.
        AdapterError, StorageError: as `find_changed_files`.
    """
    changes = [f"{escape_text(name)} {change}" for name, change in find_changed_files(folder, record).items()]
    if changes:
        raise VerificationError(f"{escape_text(folder)} is not as it was saved: {format_list(changes)}")
    return len(record.get("files") or {})


def _compare_file(path: Path, fact: object) -> str:
    """Return what happened to a file since it was recorded; an empty string where it is the same."""
    if not exists(path):
        return "missing"
    try:
        return "" if has_recorded_hash(path, fact) else "changed"
    except AdapterError:  # a link, a folder, a FIFO
        return "not a file"


# Writing


def encode_record(facts: Mapping[str, object], files: Mapping[str, bytes], *, digest: str) -> bytes:
    """Encode `lora_kit.json`: facts, the adapter's digest, size and sha256 of other files, versions, its own digest.

    Raises:
        ConfigError: it is not JSON, or longer than what is read again.
    """
    sums = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in files.items()}
    own = {"format": RECORD_FORMAT, "digest": digest, "files": sums, "versions": _collect_versions()}
    return seal_record({**facts, **own})


def seal_record(record: Mapping[str, object]) -> bytes:
    """Encode a record with the digest of itself; raise ConfigError where it is not JSON, or too long."""
    return seal_json(encode_json({**record, SELF_DIGEST: NO_DIGEST}, RECORD, limit=_SIZE_LIMIT).decode()).encode()


def encode_json(value: object, name: str, *, limit: int) -> bytes:
    """Encode a small file of an adapter; raise ConfigError for one that could not be read again."""
    try:
        text = json.dumps(_replace_nonfinite(value), indent=2, sort_keys=name == RECORD, ensure_ascii=name != RECORD)
        data = f"{text}\n".encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the content of {name} is not JSON: {error}") from None
    if len(data) > limit:
        raise ConfigError(f"{name} would have {len(data):,} bytes; at most {limit:,} are read")
    return data


def _replace_nonfinite(value: object) -> object:
    """Return null for NaN and infinity, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _replace_nonfinite(item) for key, item in value.items()}
    return [_replace_nonfinite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _collect_versions() -> dict[str, str]:
    import torch

    from lora_kit.version import __version__

    return {"lora_kit": __version__, "torch": str(torch.__version__)}
