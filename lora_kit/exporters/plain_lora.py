"""What every export starts from: the adapter in a form that any program reads, and the config of its base."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.peft_keys import LoraWeights
from lora_kit.errors import BaseModelError, ExportError, MergeError
from lora_kit.generation.prompts import find_template
from lora_kit.io.portable_paths import make_folder_portable
from lora_kit.io.safetensors import encode_safetensors
from lora_kit.io.text import escape_text
from lora_kit.merging.checkpoint.meta_model import TaskHead, build_empty_model
from lora_kit.models.infer_base import NamedBase
from lora_kit.models.locate import find_local_folder, locate_base
from lora_kit.models.silence import silence_libraries
from lora_kit.names import CHAT_TEMPLATE_FILE
from lora_kit.targets.compatibility import match_adapter
from lora_kit.targets.legacy_names import convert_to_model_names

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ConfigFields = dict[str, Any]
"""The fields of transformers' config of a base."""


@dataclass(frozen=True)
class PlainLora:
    """LoRA weights of one rank and one scaling `alpha / rank`: no patterns, no rank-stabilized scaling.

    An adapter that is already so keeps its tensors bitwise. For any other one, each scaling is folded into B (float32),
    alpha is the rank, and smaller ranks are padded with zeros.

    Attributes:
        rank: of every layer.
        alpha: of every layer.
        weights: A and B, and the magnitude of a DoRA, by path of the layer.
        changes: what was changed, in words.
    """

    rank: int
    alpha: int
    weights: Mapping[str, LoraWeights]
    changes: tuple[str, ...]

    @classmethod
    def of(cls, adapter: Adapter) -> PlainLora:
        """Return an adapter in this form."""
        config, weights = adapter.config, adapter.pairs()
        ranks = {one.a.shape[0] for one in weights.values()}
        rank = max(ranks, default=config.r)
        alpha = int(config.lora_alpha)
        changes = [
            f"{name}: folded into lora_B"
            for name, used in (("use_rslora", config.use_rslora), ("alpha_pattern", bool(config.alpha_pattern)))
            if used
        ]
        if alpha != config.lora_alpha or alpha < 1:
            changes.append(
                f"lora_alpha {config.lora_alpha:g}: folded into lora_B, since other programs read whole numbers from 1"
            )
        if ranks - {rank}:
            changes.append(f"rank_pattern: every layer padded with zeros to rank {rank}")
        elif config.r != rank or config.rank_pattern:
            changes.append(f"rank_pattern: every layer has rank {rank}, and r says so")
        if not changes:
            return cls(rank, alpha, weights, ())
        folded = {path: _fold_scaling(one, config.scaling_of(path), rank) for path, one in weights.items()}
        return cls(rank, rank, folded, tuple(changes))


def _fold_scaling(weights: LoraWeights, scaling: float, rank: int) -> LoraWeights:
    """Return LoRA weights with the scaling in B, padded with zeros to a rank, float32."""
    padding = rank - weights.a.shape[0]
    a, b = weights.a.float(), (weights.b.double() * scaling).float()
    return replace(weights, a=pad(a, (0, 0, 0, padding)), b=pad(b, (0, padding)))


@dataclass(frozen=True)
class ExportCase:
    """One adapter to export.

    Attributes:
        name: of the adapter in the other program.
        adapter: its value.
        base: hub id, local folder or `kit-base`; None where none is named.
        known: whether the base may be read: the caller named it, or the adapter names one that is here.
        out: the folder to write; None where nothing is written.
        allow: what `merge` allows, for targets that are whole models.
    """

    name: str
    adapter: Adapter
    base: str | None
    known: bool
    out: Path | None = None
    allow: tuple[str, ...] = ()

    @functools.cached_property
    def plain(self) -> PlainLora:
        return PlainLora.of(self.adapter)

    @property
    def base_path(self) -> str | None:
        """The base as other programs find it: a hub id, or the folder of a local one; None where it is not known."""
        if self.base is None or not self.known:
            return self.base
        folder = find_local_folder(self.base)
        return self.base if folder is None else make_folder_portable(str(folder.resolve()))

    @property
    def base_name(self) -> str:
        """The base, for messages and code."""
        return escape_text(self.base_path or "BASE")

    @property
    def base_argument(self) -> str:
        """The base, quoted for a command line; a shell expands `~` only outside of quotes."""
        name = self.base_name
        return f"~/{quote(name[2:])}" if name.startswith("~/") else quote(name)

    @property
    def folder(self) -> str:
        """The folder that is written, as a command line names it; relative to the project where it is in a home."""
        portable = make_folder_portable(str(self.out))
        return escape_text(Path(portable).name if portable.startswith("~") else portable)

    @property
    def chat_template(self) -> str | None:
        """The chat template of the adapter's training; None where it was not trained on conversations."""
        template = find_template(self.adapter)
        return None if template is None else template.text

    @property
    def template_argument(self) -> str | None:
        """The file of the chat template in the folder, quoted for a command line; None without one."""
        return None if self.chat_template is None else quote(f"{self.folder}/{CHAT_TEMPLATE_FILE}")

    @functools.cached_property
    def base_config(self) -> ConfigFields | None:
        """transformers' config of the base; None where the caller gave no base.

        Raises:
            BaseModelError: the base that was given has no readable config.
        """
        return None if self._config is None else self._config.to_dict()

    @functools.cached_property
    def _config(self) -> PretrainedConfig | None:
        if self.base is None or not self.known:
            return None
        return _load_base_config(self.base, self._head)

    @property
    def _head(self) -> TaskHead:
        try:
            return TaskHead.of(self.adapter)
        except MergeError:
            return TaskHead(None)  # a task for which there is no model class

    def check_base(self, allow: Collection[str]) -> None:
        """Raise AdapterError if the base is known and the adapter does not match a model of its config."""
        if self._config is not None:
            model = build_empty_model(self._config, self._head)
            adapter = convert_to_model_names(self.name, self.adapter, model)
            match_adapter(self.name, adapter, model, dtype=torch.float32, allow=allow)

    def require_base(self) -> str:
        """Return the base, to merge into; raise ExportError where none is known."""
        if self.base is None or not self.known:
            refusal = NamedBase.of(self.adapter.config, self.adapter.base).refusal
            message = f"the base is needed to merge into: the adapter {refusal}"
            raise ExportError(message, hint="give the base: a folder or a hub id")
        return self.base

    def require_config(self, why: str) -> ConfigFields:
        """Return `base_config`.

        Args:
            why: it is needed, for the message.

        Raises:
            ExportError: the caller gave no base.
        """
        if self.base_config is None:
            raise ExportError(f"the base's config is needed: {why}", hint="give the base: a folder or a hub id")
        return self.base_config


def _load_base_config(base: str, head: TaskHead) -> PretrainedConfig:
    """Return transformers' config of a base, with the defaults that its file leaves out."""
    from transformers import AutoConfig

    source = locate_base(base)
    try:
        with silence_libraries():
            config: PretrainedConfig = AutoConfig.from_pretrained(
                source.location, **source.loading_options, **head.fields
            )
    except Exception as error:  # a damaged file or a failing network can raise anything
        where = "its config cannot be read" if source.folder else "the hub gave no config"
        raise BaseModelError(
            f"{escape_text(base)}: {where} ({type(error).__name__})", hint="give the base as a local folder"
        ) from error
    return config


def write_json(file: Path, fields: Mapping[str, object]) -> None:
    """Write a JSON file."""
    file.write_text(f"{json.dumps(fields, indent=2, sort_keys=True)}\n", "utf-8")


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file."""
    with file.open("wb") as target:
        target.writelines(encode_safetensors(tensors))
