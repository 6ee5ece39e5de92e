"""The layouts of other tools, and the plain pairs that say the same.

Each takes names and shapes from its tool's own writer:
PEFT (`save_pretrained`, and state dicts of wrapped models; https://github.com/huggingface/peft), loralib
(`lora_state_dict`; https://github.com/microsoft/LoRA), mlx-lm (`save_adapters`; https://github.com/ml-explore/mlx-lm).
"""

from __future__ import annotations

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
from lora_kit.errors import AdapterError, format_list

WRAPPERS: Final = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
"""Modules that trainers put around others; state dicts of them carry the names."""
_EMBEDDING_NAMES: Final = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in")
_NAMED_LORA_KEY: Final = re.compile(
    r"(.*\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.(?!weight$)([^.]+)(\.weight)?"
)
_SAVED_MODULE_KEY: Final = re.compile(r"(.*)\.modules_to_save\.([^.]+)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class ConversionHints:
    """What people know of an adapter and its files do not say.

    Attributes:
        lora_alpha: numerator of the scaling.
        enable_lora: which of the equal parts of a fused projection (q, k, v) have a pair.
        renames: beginnings of module paths, and what stands there in the base.
        base: what the base is called.
    """

    lora_alpha: float | None = None
    enable_lora: Sequence[bool] | None = None
    renames: Mapping[str, str] = field(default_factory=dict)
    base: str | None = None

    def renamed(self, path: str) -> str:
        for old, new in self.renames.items():
            if path == old or path.startswith(f"{old}."):
                return f"{new}{path[len(old) :]}".removeprefix(".")
        return path


@dataclass
class TranslatedAdapter:
    """What a layout stands for, in PEFT's terms of today.

    Attributes:
        config: what the adapter is.
        tensors: by PEFT's keys.
        notes: what was done or seen, in words.
        open: what the files do not say, in words; where there is anything, the values that depend on it are a guess.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    notes: list[str]
    open: list[str] = field(default_factory=list)


# PEFT


def from_peft(source: ForeignFiles, given: ConversionHints) -> TranslatedAdapter:
    """A PEFT folder of any age, or the state dict of a wrapped model saved in its place."""
    fields = dict(source.fields or {})
    if not fields:
        raise AdapterError(f"{source.weights} has PEFT's names, and no adapter_config.json is beside it")
    notes: list[str] = []
    tensors = _normalize_peft_keys(source.tensors, given, notes)
    enabled = given.enable_lora or fields.pop("enable_lora", None)
    fields.pop("merge_weights", None)
    if enabled:
        count = sum(map(bool, enabled))
        config = LoraConfig.from_dict(fields | {"r": fields["r"] * count, "lora_alpha": fields["lora_alpha"] * count})
        tensors = {key: _ungroup_b(t, enabled) if t.dim() == 3 else t for key, t in tensors.items()}
        notes.append(
            f"enable_lora {[bool(part) for part in enabled]}: pairs for {count} of {len(enabled)} equal parts of each "
            "layer are one pair with zeros between them"
        )
    else:
        config = LoraConfig.from_dict(fields)
    return TranslatedAdapter(config, tensors, notes)


def _normalize_peft_keys(tensors: Mapping[str, Tensor], given: ConversionHints, notes: list[str]) -> dict[str, Tensor]:
    """By the keys `save_pretrained` would have written: no wrappers, no names of adapters, with its prefix."""
    found, names, dropped = {}, set(), 0
    for key, tensor in tensors.items():
        bare = _strip_wrappers(key)
        if ".original_module." in bare:
            dropped += 1
            continue
        for pattern in (_NAMED_LORA_KEY, _SAVED_MODULE_KEY):
            if match := pattern.fullmatch(bare):
                names.add(match[2])
                bare = f"{match[1]}{match[3] or ''}" if pattern is _NAMED_LORA_KEY else f"{match[1]}.{match[3]}"
        found[PREFIX + given.renamed(bare.removeprefix(PREFIX))] = tensor
    if len(names) > 1:
        raise AdapterError(
            f"the file holds several adapters: {format_list(sorted(names))}", hint="save each on its own"
        )
    if names:
        notes.append(f"the name of the adapter, {names.pop()!r}, stood in every key")
    if dropped:
        notes.append(f"{dropped} tensors of original modules, which belong to the base, are left out")
    if len(found) + dropped < len(tensors):
        raise AdapterError("keys are the same once wrappers and names are taken out of them")
    if any(not key.startswith(PREFIX) for key in tensors):
        notes.append(f"keys are written as PEFT does, with {PREFIX} and nothing of what was wrapped around modules")
    return found


def _strip_wrappers(key: str) -> str:
    return ".".join(part for part in key.removeprefix("module.").split(".") if part not in WRAPPERS)


# loralib


def from_loralib(source: ForeignFiles, given: ConversionHints) -> TranslatedAdapter:
    """`lora_state_dict` of loralib: `<path>.lora_A` (r, in), `<path>.lora_B` (out, r), and what else was trained."""
    pairs = _collect_a_and_b(source.tensors, given, (".lora_A", ".lora_B"))
    notes = ["names of loralib"]
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, tuple[int, float]] = {}
    for path, (a, b) in pairs.items():
        rank = b.shape[1]
        parts = a.shape[0] // rank
        if parts > 1:
            b = _ungroup_b(b.unsqueeze(-1), _require_enable_lora(path, parts, given))
        alpha = rank if given.lora_alpha is None else given.lora_alpha
        ranks[path] = (a.shape[0], alpha * parts)
        tensors |= dict(zip(lora_weight_keys(path, "linear"), (a, b), strict=True))
    rest = {given.renamed(_strip_wrappers(key)): t for key, t in source.tensors.items() if ".lora_" not in key}
    saved = sorted({_find_outermost_module(key, ranks) for key in rest})  # a head, or a norm
    tensors |= {f"{PREFIX}{key}": tensor for key, tensor in rest.items()}
    if saved:
        notes.append(f"trained whole: {format_list(saved)}")
    left_open = [] if given.lora_alpha is not None else ["lora_alpha: the file does not say it"]
    return TranslatedAdapter(_build_config(ranks, given, modules_to_save=tuple(saved)), tensors, notes, left_open)


def _require_enable_lora(path: str, parts: int, given: ConversionHints) -> Sequence[bool]:
    if given.enable_lora is None:
        raise AdapterError(
            f"{path} has pairs for {parts} parts of a fused projection, and the file does not say which",
            hint="give enable_lora: true or false for each part of q, k, v",
        )
    return given.enable_lora


def _find_outermost_module(key: str, pairs: Iterable[str]) -> str:
    """The outermost module that a tensor lies in and no pair does: `classifier` for `classifier.dense.weight`."""
    parts = key.split(".")
    for length in range(1, len(parts)):
        module = ".".join(parts[:length])
        if not any(path == module or path.startswith(f"{module}.") for path in pairs):
            return module
    raise AdapterError(
        f"{key} belongs to a layer that has a pair", hint="biases trained beside pairs are not supported"
    )


# mlx-lm


def from_mlx(source: ForeignFiles, given: ConversionHints) -> TranslatedAdapter:
    """mlx-lm: `<path>.lora_a` (in, r), `<path>.lora_b` (r, out), with a scale in the config; `.m` of a DoRA."""
    fields = source.fields or {}
    kind = fields.get("fine_tune_type", "lora")
    settings = fields.get("lora_parameters")
    if kind not in ("lora", "dora") or not isinstance(settings, Mapping):
        raise AdapterError(f"fine_tune_type is {kind!r}: pairs with their lora_parameters were expected")
    scale = settings.get("scale")
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise AdapterError("lora_parameters has no scale", hint="it is what mlx-lm multiplies the update by")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, tuple[int, float]] = {}
    for path, (a, b) in _collect_a_and_b(source.tensors, given, (".lora_a", ".lora_b")).items():
        if a.dim() != 2 or b.dim() != 2:
            raise AdapterError(f"{path}: pairs of {a.dim()} dimensions are of fused experts, which are not read")
        form = "embedding" if path.rpartition(".")[2] in _EMBEDDING_NAMES else "linear"
        ranks[path] = (a.shape[1], scale * a.shape[1])
        tensors |= dict(zip(lora_weight_keys(path, form), (a.T.contiguous(), b.T.contiguous()), strict=True))
    for key, tensor in source.tensors.items():
        if key.endswith(".m"):
            tensors[magnitude_key(given.renamed(key.removesuffix(".m")))] = tensor
        elif not key.endswith((".lora_a", ".lora_b")):
            raise AdapterError(f"{key} is neither half of a pair nor a magnitude")
    base = given.base or fields.get("model")
    config = _build_config(ranks, given, base=base if isinstance(base, str) else None, use_dora=kind == "dora")
    return TranslatedAdapter(config, tensors, [f"names of mlx-lm, which keeps pairs transposed; scale {scale:g}"])


# What they share


def _collect_a_and_b(
    tensors: Mapping[str, Tensor], given: ConversionHints, ends: tuple[str, str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by path of their layer."""
    sides = [
        {given.renamed(_strip_wrappers(key.removesuffix(end))): t for key, t in tensors.items() if key.endswith(end)}
        for end in ends
    ]
    alone = sorted(sides[0].keys() ^ sides[1].keys())
    if alone:
        raise AdapterError(f"half of a pair is missing: {format_list(alone)}")
    return {path: (sides[0][path], sides[1][path]) for path in sides[0]}


def _ungroup_b(b: Tensor, enabled: Sequence[bool]) -> Tensor:
    """The B of a plain pair from that of a grouped convolution.

    Args:
        b: (parts · size, r, 1): for each part that is enabled, its own B.
        enabled: for each of the equal parts of the output, whether it has one.

    Returns:
        (len(enabled) · size, parts · r), zero but for the blocks.
    """
    parts = sum(map(bool, enabled))
    if not parts or b.dim() != 3 or b.shape[2] != 1 or b.shape[0] % parts:
        raise AdapterError(f"B {tuple(b.shape)} does not hold {parts} equal parts", hint="look at enable_lora")
    size, rank = b.shape[0] // parts, b.shape[1]
    blocks = torch.block_diag(*b.squeeze(-1).split(size))
    whole = b.new_zeros(len(enabled), size, parts * rank)
    whole[torch.tensor([bool(part) for part in enabled])] = blocks.view(parts, size, -1)
    return whole.view(-1, parts * rank)


def _build_config(ranks: Mapping[str, tuple[int, float]], given: ConversionHints, **fields: Any) -> LoraConfig:
    """A config for pairs of these ranks and alphas by path: the usual ones, and patterns for the others."""
    usual = Counter(rank for rank, _ in ranks.values()).most_common(1)[0][0]
    alpha = Counter(alpha for _, alpha in ranks.values()).most_common(1)[0][0]
    base = fields.pop("base", given.base)
    return LoraConfig(
        r=usual,
        lora_alpha=alpha,
        target_modules=tuple(ranks),
        rank_pattern={path: rank for path, (rank, _) in ranks.items() if rank != usual},
        alpha_pattern={path: own for path, (_, own) in ranks.items() if own != alpha},
        base_model_name_or_path=base,
        inference_mode=True,
        **fields,
    )
