"""Translate the layouts of other tools to plain LoRA weights with the same updates.

Names and shapes are those of each tool's own writer:
PEFT (`save_pretrained`, and state dicts of wrapped models; https://github.com/huggingface/peft), loralib
(`lora_state_dict`; https://github.com/microsoft/LoRA), mlx-lm (`save_adapters`; https://github.com/ml-explore/mlx-lm).
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from lora_kit.adapter.conversion.foreign_files import ForeignFiles
from lora_kit.adapter.peft_keys import PREFIX, lora_weight_keys, magnitude_key
from lora_kit.config.lora_config import LoraConfig
from lora_kit.config.peft_fields import HEADS_SAVED_BY_TASK
from lora_kit.config.renamed_paths import rename_config_paths
from lora_kit.errors import AdapterError, format_list
from lora_kit.layers.introspect import WRAPPER_NAMES

_EMBEDDING_NAMES: Final = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in")
_NAMED_KEYS: Final = (
    re.compile(r"(?P<path>.*\.lora_(?:A|B|embedding_A|embedding_B))\.(?!weight$)(?P<name>[^.]+)(?P<end>\.weight)?"),
    re.compile(r"(?P<path>.*\.lora_magnitude_vector)\.(?!weight$)(?P<name>[^.]+)(?P<end>)(?:\.weight)?"),
    re.compile(r"(?P<path>.*\.token_adapter\.trainable_tokens_delta)\.(?P<name>[^.]+)(?P<end>)"),
    re.compile(r"(?P<path>.*)\.modules_to_save\.(?P<name>[^.]+)(?P<end>\..+)"),
)
"""Keys of an adapter's tensors in a live PeftModel, and of what they are without the adapter's name."""


@dataclass(frozen=True, kw_only=True)
class ConversionHints:
    """What the user says about an adapter and its files do not.

    Attributes:
        lora_alpha: numerator of the scaling.
        enable_lora: which of the equal parts of a fused projection (q, k, v) have LoRA weights.
        renames: from beginnings of module paths in the files to those in the base.
        base: name of the base.
    """

    lora_alpha: float | None = None
    enable_lora: Sequence[bool] | None = None
    renames: Mapping[str, str] = field(default_factory=dict)
    base: str | None = None

    def rename(self, path: str) -> str:
        """Return the path of a module in the base."""
        for old, new in self.renames.items():
            if path == old or path.startswith(f"{old}."):
                return f"{new}{path[len(old) :]}".removeprefix(".")
        return path


@dataclass
class TranslatedAdapter:
    """An adapter of another layout in PEFT's format of today.

    Attributes:
        config: of the adapter.
        tensors: by PEFT's keys.
        notes: how it was converted, in words.
        open: what the files do not say, in words; the values that depend on it are a guess.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    notes: list[str]
    open: list[str] = field(default_factory=list)


# PEFT


def from_peft(source: ForeignFiles, hints: ConversionHints) -> TranslatedAdapter:
    """Translate a PEFT folder of any age, or the state dict of a wrapped model saved in its place."""
    notes: list[str] = []
    if not source.fields:
        return _from_bare_peft(source, hints, notes)
    fields = dict(source.fields)
    saved_parts, _ = fields.pop("enable_lora", None), fields.pop("merge_weights", None)
    enabled = hints.enable_lora or saved_parts
    count = sum(map(bool, enabled)) if enabled else 1
    if enabled:
        fields |= {"r": fields["r"] * count, "lora_alpha": fields["lora_alpha"] * count}
    config = LoraConfig.from_dict(fields)
    kept = (*config.modules_to_save, *HEADS_SAVED_BY_TASK.get(config.task_type or "", ()))
    tensors = _normalize_peft_keys(source.tensors, hints, notes, kept)
    if enabled:
        tensors = {key: _ungroup_b(t, enabled) if t.dim() == 3 else t for key, t in tensors.items()}
        notes.append(
            f"enable_lora {[bool(part) for part in enabled]}: LoRA weights for {count} of {len(enabled)} equal parts "
            "of each layer are joined, with zeros between them"
        )
    if hints.renames:
        config = _rename_layers(config, source.tensors, hints, kept)
    return TranslatedAdapter(config, tensors, notes)


def _from_bare_peft(source: ForeignFiles, hints: ConversionHints, notes: list[str]) -> TranslatedAdapter:
    """Translate PEFT's tensors without their config: the ranks are in the shapes, and `lora_alpha` has to be given."""
    if hints.lora_alpha is None:
        raise AdapterError(
            f"{source.weights} has PEFT's keys, but no adapter_config.json is beside it",
            hint="put it there, or give lora_alpha: the ranks are in the shapes",
        )
    tensors = _normalize_peft_keys(source.tensors, hints, notes, ())
    ranks, rest = dict[str, tuple[int, float]](), list[str]()
    for key, tensor in tensors.items():
        path, mark, ending = key.removeprefix(PREFIX).rpartition(".lora_")
        if mark and ending in ("A.weight", "embedding_A"):
            ranks[path] = (tensor.shape[0], hints.lora_alpha)
        elif key.endswith(".trainable_tokens_delta"):
            raise AdapterError(f"{key} holds token embeddings, which only an adapter_config.json names")
        elif not mark:
            rest.append(key.removeprefix(PREFIX))
    saved = sorted({_find_outermost_module(key, ranks) for key in rest})
    use_dora = any(key.endswith(".lora_magnitude_vector") for key in tensors)
    config = build_config(ranks, hints, modules_to_save=tuple(saved), use_dora=use_dora)
    notes.append("there is no adapter_config.json: the ranks are those of the shapes, the scaling is lora_alpha / r")
    return TranslatedAdapter(config, tensors, notes)


def _rename_layers(
    config: LoraConfig, tensors: Mapping[str, Tensor], hints: ConversionHints, kept: Sequence[str]
) -> LoraConfig:
    """Return a config that covers the same modules under their new names, by whole paths where its own do not."""
    config = dataclasses.replace(config, modules_to_save=tuple(map(hints.rename, config.modules_to_save)))
    keys = _normalize_peft_keys(tensors, dataclasses.replace(hints, renames={}), [], kept)
    pairs = (key.removeprefix(PREFIX).rpartition(".lora_") for key in keys)
    renamed = {path: hints.rename(path) for path, mark, _ in pairs if mark}
    covered = all(
        config.names_layer(new)
        and (config.rank_of(new), config.alpha_of(new)) == (config.rank_of(old), config.alpha_of(old))
        for old, new in renamed.items()
    )
    return config if config.target_parameters or covered else rename_config_paths(config, renamed)


def _normalize_peft_keys(
    tensors: Mapping[str, Tensor], hints: ConversionHints, notes: list[str], kept: Sequence[str]
) -> dict[str, Tensor]:
    """Return tensors by the keys of `save_pretrained`: with its prefix, without wrappers and names of adapters.

    Args:
        notes: gets what was done, in words.
        kept: ends of the paths of modules whose tensors belong to the adapter though their keys do not say so.
    """
    model = _find_prefix_of_model(tensors)
    tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(model)}
    normalized, names, others = dict[str, Tensor](), set[str](), dict[str, Tensor]()
    for key, tensor in tensors.items():
        bare = _strip_wrappers(key)
        match = next((match for pattern in _NAMED_KEYS if (match := pattern.fullmatch(bare))), None)
        if match is not None:
            names.add(match["name"])
            bare = match["path"] + (match["end"] or "")
        target = others if match is None and ".lora_" not in bare else normalized
        target[PREFIX + hints.rename(bare)] = tensor
    if len(names) > 1:
        raise AdapterError(
            f"the file holds several adapters: {format_list(sorted(names))}", hint="save each on its own"
        )
    if len(normalized) + len(others) < len(tensors):
        raise AdapterError("two keys are the same once wrappers and names of adapters are removed")
    if names:  # only a live model has them, and its state dict has the base's weights as well
        notes.append(f"the name of the adapter, {names.pop()!r}, was in every key")
        of_base = {key for key in others if not _is_kept(key, kept)}
        if of_base:
            notes.append(f"{len(of_base)} tensors of original modules and of other layers of the base are left out")
        others = {key: tensor for key, tensor in others.items() if key not in of_base}
    if any(not key.startswith(PREFIX) for key in tensors):
        notes.append(f"keys are written as PEFT writes them, with {PREFIX} and without names of wrappers")
    return normalized | others


def _find_prefix_of_model(keys: Iterable[str]) -> str:
    """Return what keys of the model with LoRA weights begin with: others are of a teacher, or of a loss.

    Raises:
        AdapterError: several models have LoRA weights, as a student and its teacher may.
    """
    around = {key.partition(PREFIX)[0] for key in keys if ".lora_" in key and PREFIX in key}
    if len(around) > 1:
        models = [name.removesuffix(".") or "the model itself" for name in sorted(around)]
        raise AdapterError(
            f"the file holds LoRA weights of several models: {format_list(models)}",
            hint="save the state dict of one of them on its own",
        )
    return around.pop() if around else ""


def _is_kept(key: str, names: Sequence[str]) -> bool:
    """Return whether a tensor of a live model is the trained one of a module in `modules_to_save`."""
    internal = ".original_module." in key or ".base_layer." in key
    return not internal and any(f"{name}." in key for name in names)


def _strip_wrappers(key: str) -> str:
    """Return a key as the base has it: without the names of wrappers, and what is around PEFT's model."""
    bare = ".".join(part for part in key.split(".") if part not in WRAPPER_NAMES)
    if PREFIX in bare:
        return bare.partition(PREFIX)[2]
    while bare.startswith("module."):
        bare = bare.removeprefix("module.")
    return bare


# loralib


def from_loralib(source: ForeignFiles, hints: ConversionHints) -> TranslatedAdapter:
    """Translate loralib's `lora_state_dict`: `<path>.lora_A` (r, in), `<path>.lora_B` (out, r), and saved modules."""
    pairs = collect_a_and_b(source.tensors, hints, (".lora_A", ".lora_B"))
    notes = ["keys of loralib"]
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, tuple[int, float]] = {}
    for path, (a, b) in pairs.items():
        rank = b.shape[1]
        parts = a.shape[0] // rank
        if parts > 1:
            b = _ungroup_b(b.unsqueeze(-1), _require_enable_lora(path, parts, hints))
        alpha = rank if hints.lora_alpha is None else hints.lora_alpha
        ranks[path] = (a.shape[0], alpha * parts)
        tensors |= dict(zip(lora_weight_keys(path, "linear"), (a, b), strict=True))
    rest = {hints.rename(_strip_wrappers(key)): t for key, t in source.tensors.items() if ".lora_" not in key}
    saved = sorted({_find_outermost_module(key, ranks) for key in rest})  # a head, or a norm
    tensors |= {f"{PREFIX}{key}": tensor for key, tensor in rest.items()}
    if saved:
        notes.append(f"modules_to_save: {format_list(saved)}")
    left_open = [] if hints.lora_alpha is not None else ["lora_alpha: the file does not say it"]
    return TranslatedAdapter(build_config(ranks, hints, modules_to_save=tuple(saved)), tensors, notes, left_open)


def _require_enable_lora(path: str, parts: int, hints: ConversionHints) -> Sequence[bool]:
    if hints.enable_lora is None:
        raise AdapterError(
            f"{path} has LoRA weights for {parts} parts of a fused projection, and the file does not say which",
            hint="give enable_lora: true or false for each part of q, k, v",
        )
    return hints.enable_lora


def _find_outermost_module(key: str, pairs: Iterable[str]) -> str:
    """Return the outermost module of a tensor without LoRA weights in it: `classifier` of `classifier.dense.weight`."""
    parts = key.split(".")
    for length in range(1, len(parts)):
        module = ".".join(parts[:length])
        if not any(path == module or path.startswith(f"{module}.") for path in pairs):
            return module
    raise AdapterError(
        f"{key} belongs to a layer that has LoRA weights", hint="biases trained beside them are not supported"
    )


# mlx-lm


def from_mlx(source: ForeignFiles, hints: ConversionHints) -> TranslatedAdapter:
    """Translate mlx-lm's `<path>.lora_a` (in, r), `<path>.lora_b` (r, out), `.m` of a DoRA, and scale in the config."""
    fields = source.fields or {}
    kind = fields.get("fine_tune_type", "lora")
    settings = fields.get("lora_parameters")
    if kind not in ("lora", "dora") or not isinstance(settings, Mapping):
        raise AdapterError(f"fine_tune_type is {kind!r}: lora or dora with lora_parameters was expected")
    scale = settings.get("scale")
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise AdapterError("lora_parameters has no scale", hint="it is the factor of the update in mlx-lm")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, tuple[int, float]] = {}
    for path, (a, b) in collect_a_and_b(source.tensors, hints, (".lora_a", ".lora_b")).items():
        if a.dim() != 2 or b.dim() != 2:
            raise AdapterError(
                f"{path}: LoRA weights of {a.dim()} dimensions are of fused experts, which are not supported"
            )
        form = "embedding" if path.rpartition(".")[2] in _EMBEDDING_NAMES else "linear"
        ranks[path] = (a.shape[1], scale * a.shape[1])
        tensors |= dict(zip(lora_weight_keys(path, form), (a.T.contiguous(), b.T.contiguous()), strict=True))
    for key, tensor in source.tensors.items():
        if key.endswith(".m"):
            tensors[magnitude_key(hints.rename(key.removesuffix(".m")))] = tensor
        elif not key.endswith((".lora_a", ".lora_b")):
            raise AdapterError(f"{key} is neither lora_a, nor lora_b, nor a magnitude")
    base = hints.base or fields.get("model")
    config = build_config(ranks, hints, base=base if isinstance(base, str) else None, use_dora=kind == "dora")
    return TranslatedAdapter(
        config, tensors, [f"keys of mlx-lm, which stores LoRA weights transposed; scale {scale:g}"]
    )


# Shared by all layouts


def collect_a_and_b(
    tensors: Mapping[str, Tensor], hints: ConversionHints, ends: tuple[str, str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B by path of their layer."""
    sides = [
        {hints.rename(_strip_wrappers(key.removesuffix(end))): t for key, t in tensors.items() if key.endswith(end)}
        for end in ends
    ]
    alone = sorted(sides[0].keys() ^ sides[1].keys())
    if alone:
        raise AdapterError(f"A or B is missing: {format_list(alone)}")
    return {path: (sides[0][path], sides[1][path]) for path in sides[0]}


def _ungroup_b(b: Tensor, enabled: Sequence[bool]) -> Tensor:
    """Return the B of a plain LoRA from that of a grouped convolution.

    Args:
        b: (parts · size, r, 1): for each part that is enabled, its own B.
        enabled: for each of the equal parts of the output, whether it has LoRA weights.

    Returns:
        (len(enabled) · size, parts · r), zero outside the blocks.
    """
    parts = sum(map(bool, enabled))
    if not parts or b.dim() != 3 or b.shape[2] != 1 or b.shape[0] % parts:
        raise AdapterError(f"B {tuple(b.shape)} does not hold {parts} equal parts", hint="look at enable_lora")
    size, rank = b.shape[0] // parts, b.shape[1]
    blocks = torch.block_diag(*b.squeeze(-1).split(size))
    whole = b.new_zeros(len(enabled), size, parts * rank)
    whole[torch.tensor([bool(part) for part in enabled])] = blocks.view(parts, size, -1)
    return whole.view(-1, parts * rank)


def build_config(ranks: Mapping[str, tuple[int, float]], hints: ConversionHints, **fields: Any) -> LoraConfig:
    """Return a config for ranks and alphas by path: the most common ones, and patterns for the others."""
    rank = Counter(rank for rank, _ in ranks.values()).most_common(1)[0][0]
    alpha = Counter(alpha for _, alpha in ranks.values()).most_common(1)[0][0]
    base = fields.pop("base", hints.base)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=tuple(ranks),
        rank_pattern={path: own for path, (own, _) in ranks.items() if own != rank},
        alpha_pattern={path: own for path, (_, own) in ranks.items() if own != alpha},
        base_model_name_or_path=base,
        inference_mode=True,
        **fields,
    )
