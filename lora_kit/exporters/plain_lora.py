"""What every export starts from: the adapter in a form that any reader understands, and what is known of its base."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.peft_keys import LoraWeights
from lora_kit.errors import BaseModelError, ExportError, MergeError
from lora_kit.io.text import escape_text
from lora_kit.merging.checkpoint.meta_model import TaskHead, build_empty_model
from lora_kit.models.locate import find_local_folder, locate_base
from lora_kit.models.silence import silence_libraries
from lora_kit.targets.compatibility import match_adapter
from lora_kit.targets.legacy_names import convert_to_model_names


@dataclass(frozen=True)
class PlainLora:
    """An adapter of one rank and one scaling `alpha / rank`: no patterns, nothing rank-stabilised.

    Where it was so already, its tensors are as they were, bit for bit. Elsewhere each scaling is in B, in float32,
    alpha is the rank, and smaller ranks are filled up with zeros.

    Attributes:
        rank, alpha: of every pair.
        pairs: by path of their layer.
        changes: what was done, in words.
    """

    rank: int
    alpha: int
    pairs: Mapping[str, LoraWeights]
    changes: tuple[str, ...]

    @classmethod
    def of(cls, adapter: Adapter) -> PlainLora:
        config, pairs = adapter.config, adapter.pairs()
        rank = max((pair.a.shape[0] for pair in pairs.values()), default=config.r)
        alpha = int(config.lora_alpha)
        changes = [
            f"{name}: folded into lora_B"
            for name, there in (("use_rslora", config.use_rslora), ("alpha_pattern", bool(config.alpha_pattern)))
            if there
        ]
        if alpha != config.lora_alpha or alpha < 1:
            changes.append(f"lora_alpha {config.lora_alpha:g}: folded into lora_B, as whole numbers from 1 are read")
        if any(pair.a.shape[0] != rank for pair in pairs.values()):
            changes.append(f"rank_pattern: every pair filled up with zeros to rank {rank}")
        elif config.r != rank or config.rank_pattern:
            changes.append(f"rank_pattern: all pairs have rank {rank}, and r says so")
        if not changes:
            return cls(rank, alpha, pairs, ())
        folded = {path: _fold_scaling(pair, config.scaling_of(path), rank) for path, pair in pairs.items()}
        return cls(rank, rank, folded, tuple(changes))

    def delta(self, path: str) -> Tensor:
        """`alpha / rank · B A` in double precision."""
        pair = self.pairs[path]
        return self.alpha / self.rank * (pair.b.double() @ pair.a.double())


def _fold_scaling(pair: LoraWeights, scaling: float, rank: int) -> LoraWeights:
    missing = rank - pair.a.shape[0]
    a, b = pair.a.float(), (pair.b.double() * scaling).float()
    if missing:
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)
    return LoraWeights(a, b, pair.kind)


@dataclass(frozen=True)
class ExportCase:
    """One adapter on its way to one reader.

    Attributes:
        name: what the adapter is called there.
        adapter: as it is here.
        base: hub id, local folder or `kit-base`, where it is known.
        known: whether the base may be read: the caller gave it, or the adapter names one that is here.
        out: the folder that is written; None where nothing is.
    """

    name: str
    adapter: Adapter
    base: str | None
    known: bool
    out: Path | None = None

    @functools.cached_property
    def plain(self) -> PlainLora:
        return PlainLora.of(self.adapter)

    @property
    def base_path(self) -> str | None:
        """The base as other tools find it: a hub id, or the folder of a local one; None where it is not known."""
        if self.base is None or not self.known:
            return self.base
        folder = find_local_folder(self.base)
        return self.base if folder is None else str(folder.resolve())

    @property
    def base_name(self) -> str:
        """The base in a command."""
        return escape_text(self.base_path or "BASE")

    @property
    def server_argument(self) -> str:
        """`name=folder`, as servers take an adapter on their command line."""
        return quote(f"{self.name}={self.out}")

    @functools.cached_property
    def base_config(self) -> dict[str, Any] | None:
        """transformers' config of the base; None where no base is known well enough to look.

        Raises:
            BaseModelError: the base that was given has none that can be read.
        """
        return None if self._config is None else self._config.to_dict()

    @functools.cached_property
    def _config(self) -> Any:
        if self.base is None or not self.known:
            return None
        return _load_base_config(self.base, self._head)

    @property
    def _head(self) -> TaskHead:
        try:
            return TaskHead.of(self.adapter)
        except MergeError:
            return TaskHead(None)  # a task that says nothing about the model

    def check_base(self, allow: Collection[str]) -> None:
        """Where the base is known, raise AdapterError unless the adapter fits a model of its config."""
        if self._config is not None:
            model = build_empty_model(self._config, self._head)
            adapter = convert_to_model_names(self.name, self.adapter, model)
            match_adapter(self.name, adapter, model, dtype=torch.float32, allow=allow)

    def require_config(self, why: str) -> dict[str, Any]:
        """As `base_config`.

        Raises:
            ExportError: no base is known.
        """
        if self.base_config is None:
            raise ExportError(f"the base's config is needed: {why}", hint="give the base: a folder or a hub id")
        return self.base_config


def _load_base_config(base: str, head: TaskHead) -> Any:
    """transformers' config of a base, with the defaults that its file leaves out."""
    from transformers import AutoConfig

    source = locate_base(base)
    try:
        with silence_libraries():
            return AutoConfig.from_pretrained(source.location, **source.loading_options, **head.fields)
    except Exception as error:  # a damaged file, or any failure of the network, of whatever library it comes from
        where = "its config cannot be read" if source.folder else "the hub gave no config"
        raise BaseModelError(
            f"{escape_text(base)}: {where} ({type(error).__name__})", hint="give the base as a local folder"
        ) from error
