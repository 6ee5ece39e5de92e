"""Adapter: an immutable value of config, tensors and identity."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from lora_kit.adapter.adapter_digest import compute_digest
from lora_kit.adapter.adapter_location import resolve_folder
from lora_kit.adapter.adapter_record import RECORD, encode_record
from lora_kit.adapter.file_changes import identify_files, wait_until_settled
from lora_kit.adapter.folder import (
    ALLOWANCES,
    CARD,
    CONFIG,
    WEIGHTS,
    AdapterFolder,
    check_allowances,
    check_file_names,
    encode_config,
    is_adapter_folder,
)
from lora_kit.adapter.model_card import render_adapter_card
from lora_kit.adapter.peft_keys import LoraWeights, TokenEmbeddings, classify_tensors, name_saved_heads
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import AdapterError, ConfigError, LoraKitError, format_list
from lora_kit.io.atomic_write import write_folder
from lora_kit.io.given_values import parse_path
from lora_kit.io.portable_paths import make_folder_portable
from lora_kit.io.safetensors import encode_safetensors, hash_tensors
from lora_kit.io.text import escape_text
from lora_kit.torch_utils import translate_out_of_memory

logger = logging.getLogger(__name__)

_READ_ATTEMPTS: Final = 5
"""How often a folder is read at most, because it changed meanwhile."""


class Adapter:
    """Config, named tensors and identity; equal where the digests are equal.

    Args:
        config: of the adapter.
        tensors: by PEFT's keys; on the CPU, not to be written to.
        record: further facts carried in `lora_kit.json` (base, recipe, seed, metrics, versions).
        allow: which of `ALLOWANCES` are accepted instead of rejected.

    Attributes:
        config: of the adapter.
        tensors: by PEFT's keys, read-only: `lora_A` (r, in), `lora_B` (out, r), saved modules as in the base.
        record: further facts, read-only.
        folder: that it was loaded from, for messages; None of any other. No part of its identity.

    Raises:
        AdapterError: on construction, listing every tensor that does not match the config.
        ConfigError: on construction, for an unknown name in `allow`.
    """

    def __init__(
        self,
        config: LoraConfig,
        tensors: Mapping[str, Tensor],
        *,
        record: Mapping[str, object] | None = None,
        allow: Collection[str] = (),
    ) -> None:
        check_allowances(allow)
        _check_parts(config, tensors)
        if config.starts_from_weight:
            raise AdapterError(
                f"init_lora_weights={config.init_lora_weights} is for an adapter that is yet to be trained",
                hint="a bank's snapshot of such an adapter is a plain LoRA",
            )
        config = name_saved_heads(config, tensors)
        self.config = config
        self.tensors: Mapping[str, Tensor] = MappingProxyType({key: t.detach() for key, t in tensors.items()})
        self.record: Mapping[str, Any] = MappingProxyType(dict(record or {}))
        self.folder: Path | None = None
        self._contents = classify_tensors(config, self.tensors, allow)
        if (
            self._contents.pairs
            and not self._contents.tokens
            and not any(pair.b.any() for pair in self._contents.pairs.values())
        ):
            logger.warning("every lora_B is zero: this adapter does nothing")

    @property
    def base(self) -> Mapping[str, object] | None:
        """Fingerprint of the base it was made for; None where it is not known."""
        base: Mapping[str, object] | None = self.record.get("base")
        return base

    def pairs(self) -> Mapping[str, LoraWeights]:
        """Return the LoRA weights by path of their layer.

        Raises:
            AdapterError: some are for parameters or convolutions, or there are token embeddings as well. A caller that
                asks for the weights of layers alone would misread them.
        """
        others = {pair.kind for pair in self._contents.pairs.values()} - {"linear", "embedding"}
        if others:
            raise AdapterError(
                f"it has LoRA weights for a {format_list(sorted(others))}, which is not supported here",
                hint="load it into a bank; bank.merge folds it into the model in memory",
            )
        if self._contents.tokens:
            raise AdapterError(
                f"it has token embeddings (trainable_token_indices) for {format_list(sorted(self._contents.tokens))}, "
                "which are not supported here",
                hint="load it into a bank, or merge it into its base",
            )
        return self.all_pairs()

    def all_pairs(self) -> Mapping[str, LoraWeights]:
        """Return the LoRA weights by path, including those for parameters (`target_parameters`) and convolutions."""
        return MappingProxyType(self._contents.pairs)

    def saved(self) -> Mapping[str, Tensor]:
        """Return the tensors of `modules_to_save`, by path (`score.weight`)."""
        return MappingProxyType(self._contents.saved)

    def tokens(self) -> Mapping[str, TokenEmbeddings]:
        """Return the token embeddings (`trainable_token_indices`), by path of the embedding or head."""
        return MappingProxyType(self._contents.tokens)

    def base_copies(self) -> Mapping[str, Tensor]:
        """Return the base weights that PEFT saved beside an adapted embedding, by path of the layer."""
        return MappingProxyType(self._contents.copies)

    @property
    def num_parameters(self) -> int:
        """Elements of the LoRA weights, saved modules and token embeddings."""
        copies = sum(tensor.numel() for tensor in self._contents.copies.values())
        return sum(tensor.numel() for tensor in self.tensors.values()) - copies

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @functools.cached_property
    def digest(self) -> str:
        """Identity: sha256 of the config fields that give the tensors their meaning, and of the canonical weight file's
        sha256.

        Names and labels do not count.
        """
        return compute_digest(self.config, hash_tensors(self.tensors))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Adapter) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Callable[..., Adapter], tuple[LoraConfig, dict[str, Tensor], dict[str, object]]]:
        # Mapping proxies do not pickle. What was allowed once is not checked again.
        return _rebuild_adapter, (self.config, dict(self.tensors), dict(self.record))

    def __repr__(self) -> str:
        size = f"{len(self._contents.pairs)} layers, r={self.config.r}, {self.num_parameters:,} parameters"
        return f"Adapter({size}, {self.digest[:12]})"

    @classmethod
    def load(cls, folder: str | Path, *, allow: Collection[str] = ()) -> Adapter:
        """Read an adapter folder, strictly.

        Args:
            folder: of the adapter, as a path; or, as text, its name in the store `adapters/` or an id of the hub, see
                `lora_kit.adapter.adapter_location.resolve_adapter`.
            allow: which of `ALLOWANCES` are accepted instead of rejected.

        Raises:
            AdapterError: there is no such adapter, or its weights or record are wrong: names the file.
            ConfigError: `adapter_config.json` is wrong, or `folder` is neither text nor a path.
            StorageError: a file cannot be read, or does not fit in memory.

        Example:
            adapter = lk.Adapter.load("adapters/sql")
            adapter.config.r, adapter.num_parameters, adapter.digest
        """
        check_allowances(allow)
        folder = resolve_folder(folder)
        for _ in range(_READ_ATTEMPTS):
            identity = wait_until_settled(folder)
            try:
                adapter = cls._read(folder, allow)
            except LoraKitError:
                if identify_files(folder) == identity:
                    raise
                continue
            # The digests of a record prove that its files belong together; without them, only time does.
            is_proved = "files" in adapter.record and "changed-files" not in allow
            if is_proved or identify_files(folder) == identity:
                return adapter
        raise AdapterError(f"{escape_text(folder)} was changed while it was read", hint="load it again")

    @classmethod
    @translate_out_of_memory("there is not enough memory for the adapter", hint="free some, and load it again")
    def _read(cls, folder: Path, allow: Collection[str]) -> Adapter:
        source = AdapterFolder.open(folder, allow=allow)
        source.log_caveats()
        if source.facts is None:
            return cls._build(source, source.read(seen=lambda piece: None).tensors, allow)
        sha, error = hashlib.sha256(), None
        # Hashed while it is read and checked: hashing takes longest, and needs no lock of the interpreter.
        with ThreadPoolExecutor(max_workers=1) as pool:  # one worker, so that pieces stay in order
            weights = source.read(seen=lambda piece: pool.submit(sha.update, piece))
            try:
                adapter = cls._build(source, weights.tensors, allow)
            except AdapterError as mismatch:
                error = mismatch
        source.check_unchanged(sha.hexdigest())  # a changed file is reported first, whatever else is wrong in it
        if error is not None:
            raise error
        if weights.canonical:
            adapter.digest = compute_digest(adapter.config, sha.hexdigest())
        source.check_identity(adapter.digest)
        return adapter

    @classmethod
    def _build(cls, source: AdapterFolder, tensors: Mapping[str, Tensor], allow: Collection[str]) -> Adapter:
        try:
            adapter = cls(source.config, tensors, record=source.record, allow=allow)
        except AdapterError as error:
            raise AdapterError(f"{source.shown}: {error.message}", hint=error.hint) from None
        adapter.folder = source.weights.parent
        if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
            message = "%s: its float64 tensors are rounded to float32 where they are used, but for a bank of float64"
            logger.warning(message, source.shown)
        return adapter

    def save(
        self,
        folder: str | Path,
        *,
        record: Mapping[str, object] | None = None,
        files: Mapping[str, bytes] | None = None,
        replace: bool = False,
    ) -> Path:
        """Write the folder, all or nothing, synced to disk. No home folder is named in it.

        Args:
            folder: to write.
            record: facts to add to those that the adapter carries: `base`, `recipe`, `seed`, `metrics`.
            files: further files of the folder (a recipe, a picture), by name.
            replace: an adapter that is there may be replaced.

        Returns:
            The folder.

        Raises:
            StorageError: the folder exists, or writing fails; what was there is unchanged.
            ConfigError: `record` is not JSON, or a name in `files` is not allowed for a further file.
        """
        folder = parse_path(folder, name="folder")
        contents = encode_adapter(self, Path(os.path.abspath(folder)).name, record=record, files=files)
        write_folder(folder, contents, replace=replace, owned=is_adapter_folder)
        return folder


def encode_adapter(
    adapter: Adapter, name: str, *, record: Mapping[str, object] | None = None, files: Mapping[str, bytes] | None = None
) -> dict[str, bytes]:
    """Return the files of an adapter's folder by name, in the order in which they are written.

    Args:
        name: of the adapter, for its card.
        record, files: as in `Adapter.save`, and its ConfigError.
    """
    facts = _make_facts_portable({**adapter.record, **(record or {})})
    config = _make_config_portable(adapter.config)
    contents = dict(files or {})
    check_file_names(contents)
    contents[CARD] = render_adapter_card(
        name,
        config,
        facts,
        parameters=adapter.num_parameters,
        digest=adapter.digest,
    )
    contents[CONFIG] = encode_config(config)
    contents[WEIGHTS] = b"".join(encode_safetensors(adapter.tensors))
    # Last, because it has the digests of the others.
    contents[RECORD] = encode_record(facts, contents, digest=adapter.digest)
    return contents


def _check_parts(config: object, tensors: object) -> None:
    """Raise ConfigError for what is no config, or no mapping."""
    if not isinstance(config, LoraConfig) or not isinstance(tensors, Mapping):
        given = f"{type(config).__name__} and {type(tensors).__name__}"
        raise ConfigError(f"a LoraConfig and a mapping of tensors were expected; {given} were given")


def _rebuild_adapter(config: LoraConfig, tensors: Mapping[str, Tensor], record: Mapping[str, object]) -> Adapter:
    return Adapter(config, tensors, record=record, allow=ALLOWANCES)


def _make_config_portable(config: LoraConfig) -> LoraConfig:
    base = config.base_model_name_or_path
    return dataclasses.replace(config, base_model_name_or_path=make_folder_portable(base)) if base else config


def _make_facts_portable(facts: Mapping[str, object]) -> dict[str, object]:
    """Return the facts of a record with the name of the base as others read it."""
    base = facts.get("base")
    if not isinstance(base, Mapping) or not isinstance(base.get("name"), str):
        return dict(facts)
    return {**facts, "base": {**base, "name": make_folder_portable(base["name"])}}
