"""One tiny model of every family, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
_TEXT = {"vocab_size": 96, "max_position_embeddings": 64, **_SIZES, **_TOKENS}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}
_EXPERTS = {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_BART = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    **_TOKENS,
}
_SHARED_POSITIONS = ("its positions go through the layers once for all rows", "one input for all")
_LONE_EXPERTS = ("its experts are modules of their own, which see no rows", "an expert does not see")
_FUSED = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
_IMAGES = {"image_size": 16, "patch_size": 8}
_DISENTANGLED = {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}


@dataclass(frozen=True, eq=False)
class Family:
    """A family of models.

    Attributes:
        name: as people call it.
        kind: the class of transformers.
        config: its fields, tiny.
        inputs: one batch of three rows, labels included.
        more: fields of a LoraConfig beside those that every family gets.
        no_rows: why its rows cannot use different adapters, and how that is refused; empty where they can.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    inputs: Callable[[], dict[str, Tensor]]
    no_rows: tuple[str, str] | tuple[()] = ()
    more: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Any:
        """The model, always with the same weights."""
        kind = getattr(transformers, self.kind)
        torch.manual_seed(0)
        return kind(kind.config_class(**self.config)).eval()


def outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a model gives, one entry per row of the batch."""
    with torch.no_grad():
        return _main(model(**inputs))


def loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    found: Any = model(**inputs)
    value: Tensor = found.loss if "labels" in inputs else _main(found).square().sum(-1).sub(1.5).square().mean()
    return value


def _main(found: Any) -> Tensor:
    if "text_embeds" in found:
        return torch.cat([found.text_embeds, found.image_embeds + found.text_embeds], dim=1)
    value: Tensor = found.logits
    return value


def _ids(length: int = 6, *, seed: int = 1) -> Tensor:
    return torch.randint(3, 96, (3, length), generator=torch.Generator().manual_seed(seed))


def _numbers(*shape: int) -> Tensor:
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))


def _causal() -> dict[str, Tensor]:
    return {"input_ids": _ids(), "labels": _ids()}


def _classes() -> dict[str, Tensor]:
    return {"input_ids": _ids(), "labels": torch.tensor([0, 1, 1])}


def _translated() -> dict[str, Tensor]:
    return {"input_ids": _ids(), "labels": _ids(5, seed=3)}


def _pictures() -> dict[str, Tensor]:
    return {"pixel_values": _numbers(3, 16, 16), "labels": torch.tensor([0, 1, 1])}


def _captioned() -> dict[str, Tensor]:
    ids = _ids()
    ids[:, -1] = 2
    return {"input_ids": ids, "pixel_values": _numbers(3, 16, 16)}


def _heard() -> dict[str, Tensor]:
    return {"input_features": _numbers(8, 32), "labels": _ids(5, seed=3)}


FAMILIES = [
    Family("GPT-2", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96,
                                        **_TOKENS}, _causal),
    Family("GPT-Neo", "GPTNeoForCausalLM", {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 96,
           "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, "intermediate_size": 48,
           "bos_token_id": 1, "eos_token_id": 2}, _causal),
    Family("GPT-NeoX", "GPTNeoXForCausalLM", _TEXT, _causal),
    Family("OPT", "OPTForCausalLM", {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
           "vocab_size": 96, "max_position_embeddings": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
           _causal),
    Family("BLOOM", "BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, **_TOKENS},
           _causal),
    Family("Llama", "LlamaForCausalLM", _GROUPED, _causal),
    Family("Mistral", "MistralForCausalLM", _GROUPED, _causal),
    Family("Qwen 2", "Qwen2ForCausalLM", _GROUPED, _causal),
    Family("Qwen 3", "Qwen3ForCausalLM", _GROUPED, _causal),
    Family("Gemma 2", "Gemma2ForCausalLM", {**_GROUPED, "query_pre_attn_scalar": 8}, _causal),
    Family("Gemma 3", "Gemma3ForCausalLM", {**_GROUPED, "query_pre_attn_scalar": 8}, _causal),
    Family("Phi-3", "Phi3ForCausalLM", _GROUPED, _causal),
    Family("Falcon", "FalconForCausalLM", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2,
           "num_attention_heads": 4, **_TOKENS}, _causal),
    Family("Falcon, attention before the MLP", "FalconForCausalLM", {"vocab_size": 96, "hidden_size": 32,
           "num_hidden_layers": 2, "num_attention_heads": 4, "parallel_attn": False, "multi_query": False, "bias": True,
           "alibi": True, **_TOKENS}, _causal),
    Family("Falcon, new decoder", "FalconForCausalLM", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2,
           "num_attention_heads": 4, "new_decoder_architecture": True, "num_kv_heads": 2, **_TOKENS}, _causal),
    Family("Mamba", "MambaForCausalLM", {"vocab_size": 96, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2,
           **_TOKENS}, _causal),
    Family("BERT", "BertForSequenceClassification", _TEXT, _classes),
    Family("RoBERTa", "RobertaForSequenceClassification", _TEXT, _classes),
    Family("ALBERT", "AlbertForSequenceClassification", {**_TEXT, "embedding_size": 16}, _classes),
    Family("CamemBERT", "CamembertForSequenceClassification", _TEXT, _classes),
    Family("ELECTRA", "ElectraForSequenceClassification", {**_TEXT, "embedding_size": 16}, _classes),
    Family("DistilBERT", "DistilBertForSequenceClassification", {"vocab_size": 96, "dim": 32, "hidden_dim": 48,
           "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}, _classes),
    Family("DeBERTa v2", "DebertaV2ForSequenceClassification", _DISENTANGLED, _classes, _SHARED_POSITIONS),
    Family("DeBERTa v3", "DebertaV2ForSequenceClassification", {**_DISENTANGLED, "share_att_key": True,
           "norm_rel_ebd": "layer_norm", "position_biased_input": False}, _classes, _SHARED_POSITIONS),
    Family("ModernBERT", "ModernBertForSequenceClassification", {**_TEXT, "cls_token_id": 1, "sep_token_id": 2},
           _classes),
    Family("T5", "T5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0},
           _translated),
    Family("BART", "BartForConditionalGeneration", _BART, _translated),
    Family("Marian", "MarianMTModel", _BART, _translated),
    Family("Switch Transformers", "SwitchTransformersForConditionalGeneration", {**_T5, "num_decoder_layers": 2,
           "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
           "decoder_start_token_id": 0}, _translated, _LONE_EXPERTS),
    Family("Mixtral", "MixtralForCausalLM", {**_GROUPED, "num_local_experts": 4}, _causal),
    Family("Qwen 2 MoE", "Qwen2MoeForCausalLM", {**_EXPERTS, "shared_expert_intermediate_size": 24}, _causal),
    Family("Qwen 3 MoE", "Qwen3MoeForCausalLM", _EXPERTS, _causal),
    Family("gpt-oss", "GptOssForCausalLM", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, _causal),
    Family("Mixtral with experts", "MixtralForCausalLM", {**_GROUPED, "num_local_experts": 4}, _causal, more=_FUSED),
    Family("Qwen 2 MoE with experts", "Qwen2MoeForCausalLM", {**_EXPERTS, "shared_expert_intermediate_size": 24},
           _causal, more=_FUSED),
    Family("Qwen 3 MoE with experts and router", "Qwen3MoeForCausalLM", _EXPERTS, _causal,
           more={"target_parameters": ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"]}),
    Family("gpt-oss with experts", "GptOssForCausalLM", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
           _causal, more=_FUSED),
    Family("ViT", "ViTForImageClassification", {**_SIZES, **_IMAGES}, _pictures),
    Family("CLIP", "CLIPModel", {"text_config": _TEXT, "vision_config": {**_SIZES, **_IMAGES}, "projection_dim": 16},
           _captioned),
    Family("Whisper", "WhisperForConditionalGeneration", {**_BART, "num_mel_bins": 8, "max_source_positions": 16,
           "max_target_positions": 32}, _heard),
]  # fmt: skip
