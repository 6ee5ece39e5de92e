"""Tiny models of the families that a merge is tested with."""

from __future__ import annotations

from typing import Any, Final

import torch
import transformers

from lora_kit.models.silence import silence_libraries

SIZES: Final[dict[str, Any]] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
"""Of a tiny decoder."""
SMALL: Final[dict[str, Any]] = {
    **SIZES,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CAUSAL: Final[dict[str, dict[str, Any]]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8},
    "phi3": {},
    "phi": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "stablelm": {},
    "starcoder2": {},
    "olmo2": {},
    "cohere": {},
    "mixtral": {"num_local_experts": 3},
    "qwen2_moe": {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}
LABELED: Final[dict[str, dict[str, Any]]] = {
    "bert": {},
    "roberta": {"max_position_embeddings": 80},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "electra": {"embedding_size": 32},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "modernbert": {"global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
}
PAIRS: Final[dict[str, dict[str, Any]]] = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "bart": {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    },
}
PICTURES: Final[dict[str, dict[str, Any]]] = {"vit": {"image_size": 16, "patch_size": 4}}
TASKS: Final = {
    **dict.fromkeys(CAUSAL, ("CAUSAL_LM", "AutoModelForCausalLM")),
    **dict.fromkeys(LABELED, ("SEQ_CLS", "AutoModelForSequenceClassification")),
    **dict.fromkeys(PAIRS, ("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM")),
    **dict.fromkeys(PICTURES, (None, "AutoModelForImageClassification")),
}
FIELDS: Final = {**CAUSAL, **LABELED, **PAIRS, **PICTURES}


def tiny(family: str, dtype: torch.dtype) -> Any:
    """Return a tiny model of a family with random weights."""
    fields = {**SMALL, **FIELDS[family]}
    if family in ("gpt2", "gpt_neox", "opt", "bloom", "falcon", "phi") or family not in CAUSAL:
        fields.pop("head_dim"), fields.pop("num_key_value_heads")
    with silence_libraries():
        config = transformers.AutoConfig.for_model(family, **fields)
        torch.manual_seed(0)
        return getattr(transformers, TASKS[family][1]).from_config(config, dtype=dtype).eval()
