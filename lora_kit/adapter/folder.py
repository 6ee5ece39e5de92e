"""An adapter's folder: the names of its files, and the record of their digests in `lora_kit.json`.

The folder is PEFT's (`adapter_config.json`, `adapter_model.safetensors`, `README.md`) and one file more,
`lora_kit.json`, with digests of the others, the adapter's identity and the fingerprint of its base.
`adapters/README.md` describes every field.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import AdapterError, ConfigError, format_list
from lora_kit.io.read import exists, folder_exists, read_json, read_text
from lora_kit.io.safetensors import ChunkCallback, WeightFileContents, read_pickle, read_safetensors
from lora_kit.io.strict_json import JsonObject
from lora_kit.io.text import escape_text, format_value

logger = logging.getLogger(__name__)

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
OLD_WEIGHTS: Final = "adapter_model.bin"
CARD: Final = "README.md"
RECORD: Final = "lora_kit.json"
RECORD_FORMAT: Final = 2
"""Version of `lora_kit.json`."""
ALLOWANCES: Final = ("other-base", "extra-keys", "changed-files", "unmatched-targets")
"""What a caller may accept: another base than the adapter's, tensors beyond its config, files changed since they were
saved; and names in its config that the model does not have, which are only warned about."""

_CONFIG_LIMIT: Final = 2**20
_RECORD_LIMIT: Final = 16 * 2**20
_RECORD_TYPES: Final[Mapping[str, type]] = {
    "base": dict,
    "files": dict,
    "labels": list,
    "metrics": dict,
    "problem": str,
    "recipe": dict,
    "thresholds": list,
    "versions": dict,
}


def is_adapter_folder(folder: Path) -> bool:
    """Return whether a folder has the config or the record of an adapter."""
    return (folder / CONFIG).is_file() or (folder / RECORD).is_file()


def has_adapter_files(folder: Path) -> bool:
    """Return whether a folder has the config or the weights of an adapter; a link that leads nowhere counts."""
    return any(exists(folder / name) for name in (CONFIG, WEIGHTS, OLD_WEIGHTS))


def list_adapter_subfolders(folder: Path) -> list[Path]:
    """Return the folders directly in a folder that hold an adapter, by name; none where it cannot be read."""
    try:
        return [entry for entry in sorted(folder.iterdir()) if has_adapter_files(entry)]
    except (OSError, ValueError):  # ValueError: a NUL
        return []


def check_allowances(allow: Collection[str]) -> None:
    """Raise ConfigError for a name that is not one of `ALLOWANCES`."""
    unknown = [name for name in allow if name not in ALLOWANCES]
    if isinstance(allow, str) or unknown:
        raise ConfigError(f"allow={allow!r} was given; expected any of {format_list(ALLOWANCES)}")


# Reading


@dataclass(frozen=True)
class AdapterFolder:
    """What an adapter folder says before its weights are read.

    Attributes:
        shown: the folder's path, for messages.
        text: of `adapter_config.json`.
        config: parsed from the text.
        record: content of `lora_kit.json`; None without that file.
        facts: size and sha256 of the files by name, where these are to be checked; else None.
        weights: the weight file.
    """

    shown: str
    text: str
    config: LoraConfig
    record: JsonObject | None
    facts: JsonObject | None
    weights: Path

    @classmethod
    def open(cls, folder: Path, *, allow: Collection[str]) -> AdapterFolder:
        """Read config and record.

        Args:
            folder: of the adapter.
            allow: with `changed-files`, nothing is compared with the record.

        Raises:
            AdapterError: the folder or its record is wrong, or there are no weights.
            ConfigError: `adapter_config.json` is missing or wrong.
        """
        shown = escape_text(folder)
        if not folder_exists(folder):
            raise AdapterError(f"{shown} is not a folder", hint="an adapter is a folder with an adapter_config.json")
        if not exists(folder / CONFIG):
            below = [escape_text(entry) for entry in list_adapter_subfolders(folder)]
            hint = f"these hold an adapter: {format_list(below)}" if below else "is it an adapter folder?"
            raise ConfigError(f"{shown} has no {CONFIG}", hint=hint)
        text = read_text(folder / CONFIG, limit=_CONFIG_LIMIT)
        record = _read_record(folder)
        facts = None if record is None or "changed-files" in allow else _file_facts_of(record, shown)
        config = _parse_config(text, record, source=escape_text(folder / CONFIG))
        return cls(shown, text, config, record, facts, _find_weights_file(folder))

    @property
    def digest(self) -> str | None:
        """The identity that the record claims; None where it claims none."""
        claimed = None if self.record is None else self.record.get("digest")
        return claimed if isinstance(claimed, str) else None

    def read(self, *, seen: ChunkCallback) -> WeightFileContents:
        """Read the weight file, once its size and its header are checked.

        Args:
            seen: is called with its bytes as they are read.

        Raises:
            AdapterError: it is not what the record says, or is damaged.
            StorageError: it cannot be read.
        """

        def check_size(size: int) -> None:
            if self.facts is not None:
                _check_size(self.facts.get(self.weights.name), size, escape_text(self.weights))

        read = read_pickle if self.weights.name == OLD_WEIGHTS else read_safetensors
        return read(self.weights, check_size=check_size, seen=seen)

    def check_unchanged(self, weights_sha256: str) -> None:
        """Raise AdapterError unless size and sha256 of config and weights are those in the record."""
        if self.facts is not None:
            text = self.text.encode()
            _check_size(self.facts.get(CONFIG), len(text), f"{self.shown}/{CONFIG}")
            sums = {CONFIG: hashlib.sha256(text).hexdigest(), self.weights.name: weights_sha256}
            for name, sha256 in sums.items():
                if self.facts[name].get("sha256") != sha256:
                    raise AdapterError(
                        f"{self.shown}/{name} was changed since it was saved", hint="allow 'changed-files' to go on"
                    )

    def check_identity(self, digest: str) -> None:
        """Raise AdapterError unless the record has this digest."""
        if self.record is not None and self.record.get("digest") != digest:
            raise AdapterError(f"{self.shown}: the digest in {RECORD} is not that of the adapter", hint="save it again")

    def log_caveats(self) -> None:
        """Log what cannot be checked, and fields that are carried without a meaning here."""
        if self.weights.name == OLD_WEIGHTS:
            logger.warning("%s: reading plain tensors from %s, an older format", self.shown, OLD_WEIGHTS)
        if self.record is None:
            logger.info(
                "%s has no %s: neither its files nor the base it was made for can be checked", self.shown, RECORD
            )
        if self.config.unknown_fields:
            names = [escape_text(name) for name in self.config.unknown_fields]
            logger.warning("%s: unknown fields are kept as they are: %s", self.shown, format_list(names))
        if self.config.fields_naming_code:
            names = self.config.fields_naming_code
            logger.info("%s: fields that name code are kept and not acted on: %s", self.shown, format_list(names))


def _parse_config(text: str, record: JsonObject | None, *, source: str) -> LoraConfig:
    try:
        return LoraConfig.from_json(text, source=source)
    except ConfigError as error:
        if record is None or record.get("method") != "peft":
            raise
        hint = "peft.PeftModel.from_pretrained loads it, as its model card shows"
        raise ConfigError(f"{error.message}; this one was trained by `method: peft`", hint=hint) from None


def _read_record(folder: Path) -> JsonObject | None:
    """Read `lora_kit.json`; None if the file does not exist."""
    if not exists(folder / RECORD):
        return None
    record = read_json(folder / RECORD, limit=_RECORD_LIMIT)
    for name, kind in _RECORD_TYPES.items():
        if not isinstance(record.get(name), (kind, type(None))):
            raise AdapterError(f"{escape_text(folder / RECORD)}: {name} is {format_value(record[name])}; it is damaged")
    return record


def _file_facts_of(record: JsonObject, shown: str) -> JsonObject:
    """Return what a record says of the files beside it."""
    if record.get("format") != RECORD_FORMAT:
        raise AdapterError(
            f"{shown}/{RECORD} has format {format_value(record.get('format'))}; format {RECORD_FORMAT} is read",
            hint="allow 'changed-files' to read it unchecked, and save it again",
        )
    files: JsonObject | None = record.get("files")
    return files or {}


def _check_size(fact: object, size: int, shown: str) -> None:
    """Raise AdapterError unless a file has the size that the record says.

    Args:
        fact: what the record says of the file.
        size: of the file in bytes.
        shown: the file, for messages.
    """
    expected = fact.get("size") if isinstance(fact, dict) else None
    if not isinstance(expected, int):
        raise AdapterError(f"{RECORD} does not list {shown}", hint="was the folder put together by hand?")
    if size != expected:
        what = "truncated or replaced" if size < expected else "replaced"
        raise AdapterError(f"{shown}: {what}: {size:,} bytes, {expected:,} are expected")


def _find_weights_file(folder: Path) -> Path:
    for name in (WEIGHTS, OLD_WEIGHTS):
        if exists(folder / name):
            return folder / name
    raise AdapterError(f"{escape_text(folder)} has neither {WEIGHTS} nor {OLD_WEIGHTS}")


# Writing


def encode_config(config: LoraConfig) -> bytes:
    """Encode `adapter_config.json`."""
    return _encode_json(config.to_dict(), CONFIG, _CONFIG_LIMIT)


def encode_record(facts: Mapping[str, object], files: Mapping[str, bytes], *, digest: str) -> bytes:
    """Encode `lora_kit.json`: facts, the adapter's digest, size and sha256 of the other files, and versions."""
    sums = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in files.items()}
    own = {"format": RECORD_FORMAT, "digest": digest, "files": sums, "versions": _collect_versions()}
    return _encode_json({**facts, **own}, RECORD, _RECORD_LIMIT)


def check_file_names(files: Iterable[str]) -> None:
    """Raise ConfigError for a name that a further file of an adapter cannot have."""
    for name in files:
        if name in (CARD, CONFIG, WEIGHTS, OLD_WEIGHTS, RECORD) or name in ("", ".", "..") or set(name) & {"/", "\0"}:
            raise ConfigError(f"{format_value(name)} cannot be the name of a further file of an adapter")


def _encode_json(value: object, name: str, limit: int) -> bytes:
    """Encode a small file; raise ConfigError for one that could not be read again."""
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
