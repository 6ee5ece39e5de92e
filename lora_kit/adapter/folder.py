"""An adapter's folder: the names of its files, and how they are read before an adapter is made of them.

The folder is PEFT's (`adapter_config.json`, `adapter_model.safetensors`, `README.md`) and one file more,
`lora_kit.json`, see `lora_kit.adapter.adapter_record`. `adapters/README.md` describes every field.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lora_kit.adapter.adapter_files import CARD as CARD
from lora_kit.adapter.adapter_files import CONFIG as CONFIG
from lora_kit.adapter.adapter_files import OLD_WEIGHTS as OLD_WEIGHTS
from lora_kit.adapter.adapter_files import WEIGHTS as WEIGHTS
from lora_kit.adapter.adapter_files import has_adapter_files as has_adapter_files
from lora_kit.adapter.adapter_files import is_adapter_folder as is_adapter_folder
from lora_kit.adapter.adapter_record import RECORD, encode_json, find_changed_files, log_record_caveats, read_record
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import AdapterError, ConfigError, format_list
from lora_kit.io.given_values import is_name_collection
from lora_kit.io.read import exists, folder_exists, read_text
from lora_kit.io.strict_json import JsonObject
from lora_kit.io.text import escape_text, format_value
from lora_kit.names import CHECKPOINT_FILE

if TYPE_CHECKING:
    from lora_kit.io.safetensors import ChunkCallback, WeightFileContents

logger = logging.getLogger(__name__)

ALLOWANCES: Final = ("other-base", "extra-keys", "changed-files", "unmatched-targets")
"""What a caller may accept: another base than the adapter's, tensors beyond its config, files changed since they were
saved; and names in its config that the model does not have, which are only warned about."""

_CONFIG_LIMIT: Final = 2**20
_MAX_DEPTH: Final = 3
"""How far below a folder without an adapter others are looked for, to name them in its error."""
_MAX_NAMED: Final = 8


def check_allowances(allow: Collection[str]) -> None:
    """Raise ConfigError for a name that is not one of `ALLOWANCES`."""
    if not is_name_collection(allow) or any(name not in ALLOWANCES for name in allow):
        raise ConfigError(f"allow={format_value(allow)} was given; expected any of {format_list(ALLOWANCES)}")


def _hint_at_adapters(folder: Path) -> str:
    """Return what to give instead of a folder that holds no adapter."""
    below = [escape_text(entry) for entry in islice(_find_nested_adapters(folder, _MAX_DEPTH), _MAX_NAMED)]
    if below:
        return f"these hold an adapter: {format_list(below)}"
    if exists(folder / CHECKPOINT_FILE):
        return "a checkpoint of `method: full`, or an old one; the same recipe goes on from it"
    return "is it an adapter folder?"


def _find_nested_adapters(folder: Path, depth: int) -> Iterator[Path]:
    """Yield folders below this one that hold an adapter, at most so deep; nothing inside an adapter, and no links."""
    try:
        entries = sorted(folder.iterdir()) if depth else []
    except OSError:
        return
    for entry in entries:
        if has_adapter_files(entry):
            yield entry
        elif entry.is_dir() and not entry.is_symlink():
            yield from _find_nested_adapters(entry, depth - 1)


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
            raise ConfigError(f"{shown} has no {CONFIG}", hint=_hint_at_adapters(folder))
        text = read_text(folder / CONFIG, limit=_CONFIG_LIMIT)
        record = read_record(folder, allow=allow)
        facts: JsonObject | None = None if record is None or "changed-files" in allow else record.get("files") or {}
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
        from lora_kit.io.pickled_weights import read_pickle  # which needs torch
        from lora_kit.io.safetensors import read_safetensors

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
        if self.weights.name == WEIGHTS and exists(self.weights.with_name(OLD_WEIGHTS)):
            logger.warning(
                "%s has %s too, which is not read: remove the one that is not meant", self.shown, OLD_WEIGHTS
            )
        if self.record is None:
            logger.warning(
                "%s has no %s: neither its files nor the base it was made for can be checked", self.shown, RECORD
            )
        else:
            log_record_caveats(self.record, self.shown)
        if self.facts is not None and CARD in self.facts:
            self._log_changed_card(self.facts[CARD])
        if self.config.unknown_fields:
            names = [escape_text(name) for name in self.config.unknown_fields]
            logger.warning("%s: unknown fields are kept as they are: %s", self.shown, format_list(names))
        if self.config.fields_naming_code:
            names = self.config.fields_naming_code
            logger.info("%s: fields that name code are kept and not acted on: %s", self.shown, format_list(names))

    def _log_changed_card(self, fact: object) -> None:
        for name, change in find_changed_files(self.weights.parent, {"files": {CARD: fact}}).items():
            logger.warning("%s/%s: %s since it was saved", self.shown, name, change)


def _parse_config(text: str, record: JsonObject | None, *, source: str) -> LoraConfig:
    try:
        return LoraConfig.from_json(text, source=source)
    except ConfigError as error:
        if record is None or record.get("method") != "peft":
            raise
        hint = "peft.PeftModel.from_pretrained loads it, as its model card shows"
        raise ConfigError(f"{error.message}; this one was trained by `method: peft`", hint=hint) from None


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
    return encode_json(config.to_dict(), CONFIG, limit=_CONFIG_LIMIT)


def check_file_names(files: Iterable[str]) -> None:
    """Raise ConfigError for a name that a further file of an adapter cannot have."""
    for name in files:
        if name in (CARD, CONFIG, WEIGHTS, OLD_WEIGHTS, RECORD) or name in ("", ".", "..") or set(name) & {"/", "\0"}:
            raise ConfigError(f"{format_value(name)} cannot be the name of a further file of an adapter")
