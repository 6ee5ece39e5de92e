"""Tiny bases, adapters of every kind, and the logits that our own bank computes with them in fp32."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn

import lora_kit as lk
from lora_kit.models.rope_fields import add_older_rope_fields
from lora_kit.models.silence import silence_libraries

LENGTH: Final = 24
"""Tokens whose logits are compared."""
LEAST_EFFECT: Final = 0.3
"""The largest change of a logit by an adapter, at least: one that a program ignores cannot pass."""
_NEW_ROWS: Final = (5, 9, 30)
"""Tokens with rows of the embedding of their own; they begin every sequence."""
_SMALL: Final = {
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the least of vLLM on a CPU
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.08,
}
_LLAMA3_ROPE: Final = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
BASES: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "kit-base": ("", {}),
    "llama": ("llama", {}),
    "llama-rope": ("llama", {"rope_parameters": _LLAMA3_ROPE}),
    "llama-bias-tied": ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"tie_word_embeddings": True, "query_pre_attn_scalar": 32}),
    "gemma3": ("gemma3_text", {"tie_word_embeddings": True, "query_pre_attn_scalar": 32, "num_hidden_layers": 6}),
    "phi3": ("phi3", {"pad_token_id": 0}),
}
"""By name: the type of a config and what differs from `_SMALL`; kit-base is the one of the package, in fp32."""


@dataclass(frozen=True)
class Feature:
    """A kind of adapter.

    Attributes:
        config: fields of LoraConfig; names of layers are Llama's.
        untied: whether it makes sense on bases whose head and embedding are two tensors only.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    untied: bool = False


FEATURES: Final = {
    "plain": Feature(),
    "rslora": Feature({"use_rslora": True}),
    "alpha-pattern": Feature({"alpha_pattern": {"q_proj": 24, "down_proj": 4}}),
    "rank-pattern": Feature({"rank_pattern": {"o_proj": 2, "down_proj": 6}, "alpha_pattern": {"o_proj": 3}}),
    "half-alpha": Feature({"lora_alpha": 0.5}),
    "one-layer": Feature({"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "head": Feature({"target_modules": ["q_proj", "lm_head"]}),
    "embedding": Feature({"target_modules": ["q_proj", "embed_tokens"]}),
    "head-and-embedding": Feature({"target_modules": ["q_proj", "lm_head", "embed_tokens"]}, untied=True),
    "dora": Feature({"use_dora": True}),
    "whole-modules": Feature({"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]}),
    "tokens": Feature({"target_modules": ["q_proj"], "trainable_token_indices": list(_NEW_ROWS)}),
}
_FUSED: Final = {"q_proj": "qkv_proj", "o_proj": "o_proj", "down_proj": "down_proj"}
"""Names of Phi-3's layers."""


@dataclass(frozen=True)
class Case:
    """A base, an adapter, and what the two compute.

    Attributes:
        base: name of the base.
        feature: name of the kind of adapter; None for the base alone.
        base_folder: of the base.
        adapter_folder: as our bank saves it; None for the base alone.
        tokens: ids, `LENGTH` of them.
        logits: fp32 (LENGTH, vocabulary).
        effect: the largest change of a logit by the adapter.
    """

    base: str
    feature: str | None
    base_folder: Path
    adapter_folder: Path | None
    tokens: tuple[int, ...]
    logits: NDArray[np.float32]
    effect: float

    @property
    def key(self) -> str:
        return f"{self.base}/{self.feature or 'base'}"


def write_cases(root: Path) -> Iterator[Case]:
    """Write every base with every adapter that fits it below a folder, and yield what they compute."""
    for name in BASES:
        folder = root / "bases" / name
        _write_base(name, folder)
        base = lk.load_base(folder, dtype="fp32", device="cpu")
        generator = torch.Generator().manual_seed(7)
        drawn = torch.randint(3, len(base.tokenizer) - 1, (LENGTH - len(_NEW_ROWS),), generator=generator)
        tokens = (*_NEW_ROWS, *drawn.tolist())
        alone = compute_outputs(base.model, tokens)
        yield Case(name, None, folder, None, tokens, alone, 0.0)
        for feature, kind in FEATURES.items():
            if kind.untied and base.model.config.tie_word_embeddings:
                continue
            adapter, logits = make_adapter(base.model, _fit_names(name, kind.config), tokens, alone)
            saved = root / "adapters" / name / feature
            adapter.save(saved, replace=True)
            yield Case(name, feature, folder, saved, tokens, logits, float(np.abs(logits - alone).max()))


def _write_base(name: str, folder: Path) -> None:
    """Write a random base with kit-base's tokenizer, as transformers saves it."""
    kit = lk.load_base("kit-base", dtype="fp32", device="cpu")
    kit.tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    if name == "kit-base":
        kit.model.save_pretrained(folder)
        return
    kind, fields = BASES[name]
    special = {"bos_token_id": kit.tokenizer.bos_token_id, "eos_token_id": kit.tokenizer.eos_token_id}
    vocabulary = {"vocab_size": len(kit.tokenizer), "pad_token_id": kit.tokenizer.eos_token_id, **special}
    config = transformers.AutoConfig.for_model(kind, **{**_SMALL, **vocabulary, **fields})
    torch.manual_seed(len(name))
    with silence_libraries():
        transformers.AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(folder)
    _add_older_fields(folder / "config.json")


def _add_older_fields(file: Path) -> None:
    """Write the fields of rotary embeddings as the configs of published models have them, too."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    add_older_rope_fields(fields)
    file.write_text(json.dumps(fields, indent=2), encoding="utf-8")


def _fit_names(base: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the names that the layers of a base have."""
    if base != "phi3":
        return dict(config)
    text = json.dumps(config)
    for name, other in _FUSED.items():
        text = text.replace(f'"{name}"', f'"{other}"')
    return dict(json.loads(text))


def make_adapter(
    model: nn.Module, fields: Mapping[str, Any], tokens: tuple[int, ...], alone: NDArray[np.float32]
) -> tuple[lk.Adapter, NDArray[np.float32]]:
    """Return a random adapter that changes what a model computes enough, and what it computes with it."""
    plain = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "init_lora_weights": False}
    config = lk.LoraConfig.from_dict({**plain, **fields})
    torch.manual_seed(13)  # of A, so that every run has the same adapters
    bank = lk.attach(model, config, name="made")
    try:
        fresh = bank.snapshot("made")
    finally:
        bank.detach()
    for strength in (0.02 * 2**power for power in range(12)):
        adapter = _randomize(fresh, strength)
        logits = compute_outputs(model, tokens, adapter)
        if np.abs(logits - alone).max() >= 2 * LEAST_EFFECT:
            return adapter, logits
    raise RuntimeError(f"no adapter with {fields} changes this base enough")


def _randomize(fresh: lk.Adapter, strength: float) -> lk.Adapter:
    """Return an adapter of the same form with random tensors; A keeps its own values."""
    generator = torch.Generator().manual_seed(11)
    tensors = {}
    for key, tensor in sorted(fresh.tensors.items()):
        noise = torch.randn(tensor.shape, generator=generator)
        is_factor = ".lora_B" in key or ".lora_embedding_B" in key
        changed = strength * noise if is_factor else tensor + strength * noise * tensor.abs().mean()
        tensors[key] = tensor if ".lora_A" in key else changed.contiguous()
    return lk.Adapter(fresh.config, tensors, record=fresh.record)


@torch.no_grad()
def compute_outputs(
    model: nn.Module, tokens: tuple[int, ...], adapter: lk.Adapter | None = None
) -> NDArray[np.float32]:
    """Return the logits that a model computes with an adapter, or of a model without a head its last hidden states.

    Returns:
        fp32 (tokens, vocabulary or hidden size).
    """
    ids = torch.tensor([tokens])
    if adapter is None:
        return _read_outputs(model(input_ids=ids))
    bank = lk.attach(model, slots=1, max_rank=64)
    try:
        bank.load("made", adapter)
        with bank.using("made"):
            return _read_outputs(model(input_ids=ids))
    finally:
        bank.detach()


def _read_outputs(outputs: Mapping[str, torch.Tensor]) -> NDArray[np.float32]:
    states = outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]
    return states[0].float().numpy()  # type: ignore[no-any-return]


def compute_with(case: Case, adapter: lk.Adapter) -> NDArray[np.float32]:
    """Return the logits of a case's base and tokens with another adapter."""
    base = lk.load_base(case.base_folder, dtype="fp32", device="cpu")
    return compute_outputs(base.model, case.tokens, adapter)
