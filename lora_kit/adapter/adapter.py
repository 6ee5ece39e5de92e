"""Adapter: an immutable value of config, tensors and identity."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from torch import Tensor

from lora_kit.adapter.folder import (
    CARD,
    CONFIG,
    RECORD,
    WEIGHTS,
    AdapterFolder,
    check_allowances,
    check_file_names,
    encode_config,
    encode_record,
    is_adapter_folder,
)
from lora_kit.adapter.model_card import render_adapter_card
from lora_kit.adapter.peft_keys import LoraWeights, TokenEmbeddings, classify_tensors
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import AdapterError, LoraKitError, format_list
from lora_kit.io.atomic_write import write_folder
from lora_kit.io.safetensors import encode_safetensors, hash_tensors

logger = logging.getLogger(__name__)

_READ_ATTEMPTS: Final = 3
"""Times a folder is read anew because another one took its place meanwhile."""
_IDENTITY_FIELDS: Final = (
    "lora_alpha",
    "alpha_pattern",
    "modules_to_save",
    "r",
    "rank_pattern",
    "use_dora",
    "use_rslora",
)


class Adapter:
    """Config, named tensors and identity; equal where the digests are equal.

    Args:
        config: what the adapter is.
        tensors: by PEFT's keys; on the CPU, not to be written to.
        record: further facts carried in `lora_kit.json` (base, recipe, seed, metrics, versions).
        allow: of `ALLOWANCES`: what may pass instead of being refused.

    Attributes:
        config, record: as given.
        tensors: by PEFT's keys, read-only: `lora_A` (r, in), `lora_B` (out, r), saved modules as in the base.

    Raises:
        AdapterError: on construction, listing every tensor that does not fit the config.
        ConfigError: on construction: `allow` names nothing that is known.
    """

    def __init__(
        self,
        config: LoraConfig,
        tensors: Mapping[str, Tensor],
        *,
        record: Mapping[str, Any] | None = None,
        allow: Collection[str] = (),
    ) -> None:
        check_allowances(allow)
        if config.starts_from_weight:
            raise AdapterError(
                f"init_lora_weights={config.init_lora_weights} is of an adapter that is yet to be trained",
                hint="a bank's snapshot of one is a plain adapter",
            )
        self.config = config
        self.tensors: Mapping[str, Tensor] = MappingProxyType({key: t.detach() for key, t in tensors.items()})
        self.record: Mapping[str, Any] = MappingProxyType(dict(record or {}))
        self._contents = classify_tensors(config, self.tensors, allow)
        if (
            self._contents.pairs
            and not self._contents.tokens
            and not any(pair.b.any() for pair in self._contents.pairs.values())
        ):
            logger.warning("every lora_B is zero: this adapter does nothing")

    @property
    def base(self) -> Mapping[str, Any] | None:
        """Fingerprint of the base it was made for, where it is known."""
        return self.record.get("base")

    def pairs(self) -> Mapping[str, LoraWeights]:
        """The low-rank pairs by path of their layer.

        Raises:
            AdapterError: some are for parameters or convolutions, or there are rows of new tokens as well; whoever asks
                for pairs alone would misread these.
        """
        others = {pair.kind for pair in self._contents.pairs.values()} - {"linear", "embedding"}
        if others:
            raise AdapterError(
                f"it has pairs for a {format_list(sorted(others))}, which this cannot handle",
                hint="load it into a bank; bank.merge folds it into the model in memory",
            )
        if self._contents.tokens:
            raise AdapterError(
                f"it has rows of new tokens (trainable_token_indices) for "
                f"{format_list(sorted(self._contents.tokens))}, which "
                "this cannot handle",
                hint="load it into a bank, or merge it into its base",
            )
        return self.all_pairs()

    def all_pairs(self) -> Mapping[str, LoraWeights]:
        """The low-rank pairs by path, those for parameters (`target_parameters`) and convolutions among them."""
        return MappingProxyType(self._contents.pairs)

    def saved(self) -> Mapping[str, Tensor]:
        """The tensors of modules saved whole, by path (`score.weight`)."""
        return MappingProxyType(self._contents.saved)

    def tokens(self) -> Mapping[str, TokenEmbeddings]:
        """Rows of embeddings and heads (`trainable_token_indices`), by path of the module."""
        return MappingProxyType(self._contents.tokens)

    def base_copies(self) -> Mapping[str, Tensor]:
        """Weights of the base that PEFT wrote along with an adapted embedding, by path of the layer."""
        return MappingProxyType(self._contents.copies)

    @property
    def num_parameters(self) -> int:
        """Elements of the pairs and saved modules."""
        copies = sum(tensor.numel() for tensor in self._contents.copies.values())
        return sum(tensor.numel() for tensor in self.tensors.values()) - copies

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of the config fields that give the tensors meaning and of the sha256 of the canonical weight file.

        Names and labels do not count.
        """
        return _compute_digest(self.config, hash_tensors(self.tensors))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Adapter) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        size = f"{len(self._contents.pairs)} pairs, r={self.config.r}, {self.num_parameters:,} parameters"
        return f"Adapter({size}, {self.digest[:12]})"

    @classmethod
    def load(cls, folder: str | Path, *, allow: Collection[str] = ()) -> Adapter:
        """Read an adapter folder, strictly.

        Args:
            allow: of `ALLOWANCES`: what may pass instead of being refused.

        Raises:
            AdapterError, ConfigError: what is wrong with which file; nothing is kept.
            StorageError: a file cannot be read, or does not fit in memory.

        Example:
            adapter = lk.Adapter.load("adapters/sql")
            adapter.config.r, adapter.num_parameters, adapter.digest
        """
        check_allowances(allow)
        folder = Path(folder)
        for _ in range(_READ_ATTEMPTS):
            found = _stat_folder(folder)
            try:
                return cls._read(folder, allow)
            except LoraKitError:
                if _stat_folder(folder) == found:
                    raise
        return cls._read(folder, allow)

    @classmethod
    def _read(cls, folder: Path, allow: Collection[str]) -> Adapter:
        found = AdapterFolder.open(folder, allow=allow)
        found.log_caveats()
        if found.facts is None:
            return cls._of(found, found.read(seen=lambda piece: None).tensors, allow)
        sha, refusal = hashlib.sha256(), None
        # Hashed while it is read and looked at: hashing takes longest, and needs no lock of the interpreter.
        with ThreadPoolExecutor(max_workers=1) as pool:  # one, so that pieces stay in their order
            weights = found.read(seen=lambda piece: pool.submit(sha.update, piece))
            try:
                adapter = cls._of(found, weights.tensors, allow)
            except AdapterError as error:
                refusal = error
        found.check_unchanged(sha.hexdigest())  # that a file was changed is said before what is wrong in it
        if refusal is not None:
            raise refusal
        if weights.canonical:
            adapter.digest = _compute_digest(adapter.config, sha.hexdigest())
        found.check_identity(adapter.digest)
        return adapter

    @classmethod
    def _of(cls, found: AdapterFolder, tensors: Mapping[str, Tensor], allow: Collection[str]) -> Adapter:
        try:
            return cls(found.config, tensors, record=found.record, allow=allow)
        except AdapterError as error:
            raise AdapterError(f"{found.shown}: {error.message}", hint=error.hint) from None

    def save(
        self,
        folder: str | Path,
        *,
        record: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
        replace: bool = False,
    ) -> Path:
        """Write the folder, all or nothing, synced to disk.

        Args:
            record: facts to add to those the adapter carries: `base`, `recipe`, `seed`, `metrics`.
            files: further files of the folder (a recipe, a picture), by name.
            replace: an adapter that is there may be replaced.

        Raises:
            StorageError: the folder exists, or the disk refuses; what was there is as it was.
            ConfigError: `record` is not JSON, or a name in `files` is not one for a further file.
        """
        folder = Path(folder)
        facts = {**self.record, **(record or {})}
        contents = dict(files or {})
        check_file_names(contents)
        name = Path(os.path.abspath(folder)).name
        contents[CARD] = render_adapter_card(
            name, self.config, facts.get("metrics"), parameters=self.num_parameters, digest=self.digest
        )
        contents[CONFIG] = encode_config(self.config)
        contents[WEIGHTS] = b"".join(encode_safetensors(self.tensors))
        # Last, because it vouches for the others.
        contents[RECORD] = encode_record(facts, contents, digest=self.digest)
        write_folder(folder, contents, replace=replace, owned=is_adapter_folder)
        return folder


def _compute_digest(config: LoraConfig, weights_sha256: str) -> str:
    fields = config.to_dict()
    meaning = {name: _normalize_numbers(fields[name]) for name in _IDENTITY_FIELDS}
    if config.target_parameters:
        meaning["target_parameters"] = fields["target_parameters"]
    if config.trainable_token_indices:
        meaning["trainable_token_indices"] = fields["trainable_token_indices"]
    return hashlib.sha256(f"{json.dumps(meaning)}\n{weights_sha256}".encode()).hexdigest()


def _normalize_numbers(value: Any) -> Any:
    """16.0 is 16: a number's identity is its value."""
    if isinstance(value, Mapping):
        return {key: _normalize_numbers(item) for key, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _stat_folder(folder: Path) -> tuple[int, int] | None:
    """Which folder is at a path just now."""
    try:
        status = os.stat(folder)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
