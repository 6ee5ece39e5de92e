"""Merged equals unmerged in every family: saved, merged by files, loaded again by transformers, the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import lora_kit as lk
from lora_kit.errors import AdapterError, ConfigError, MergeError
from lora_kit.layers.introspect import kind_of
from lora_kit.merging.merge import merge
from lora_kit.merging.verification import logits
from lora_kit.models.silence import silence_libraries
from tests.merging import test_merge
from tests.support import texts
from tests.support import tiny as tiny_models

SMALL: Final[dict[str, Any]] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
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
LABELLED: Final[dict[str, dict[str, Any]]] = {
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
    **dict.fromkeys(LABELLED, ("SEQ_CLS", "AutoModelForSequenceClassification")),
    **dict.fromkeys(PAIRS, ("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM")),
    **dict.fromkeys(PICTURES, (None, "AutoModelForImageClassification")),
}
FIELDS: Final = {**CAUSAL, **LABELLED, **PAIRS, **PICTURES}


def tiny(family: str, dtype: torch.dtype) -> Any:
    fields = {**SMALL, **FIELDS[family]}
    if family in ("gpt2", "gpt_neox", "opt", "bloom", "falcon", "phi") or family not in CAUSAL:
        fields.pop("head_dim"), fields.pop("num_key_value_heads")
    with silence_libraries():
        config = transformers.AutoConfig.for_model(family, **fields)
        torch.manual_seed(0)
        return getattr(transformers, TASKS[family][1]).from_config(config, dtype=dtype).eval()


def answers(model: Any) -> Tensor:
    """Logits for fixed inputs, computed in fp32."""
    generator = torch.Generator().manual_seed(2)
    if model.config.model_type in PICTURES:
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    else:
        ids = torch.randint(3, 96, (2, 9), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
    with logits.use_fp32(model), torch.inference_mode():
        found: Tensor = model(**inputs).logits
    return found.float()


def names_of(model: nn.Module) -> list[str]:
    """Every linear layer but the heads, which share their weight with an embedding in some families."""
    paths = [path for path, module in model.named_modules() if kind_of(module) == "linear"]
    return sorted({path.rpartition(".")[2] for path in paths} - {"lm_head", "score", "classifier", "embed_out"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FIELDS)
def test_merged_equals_unmerged(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype)
    with silence_libraries():
        model.save_pretrained(tmp_path / "base")
    task, kind = TASKS[family]
    config = lk.LoraConfig(r=4, lora_alpha=8, target_modules=names_of(model), init_lora_weights=False, task_type=task)
    bank = lk.attach(model, config, name="x", dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for leaf in bank.parameters("x"):
            leaf.copy_(torch.randn_like(leaf) * 0.05)
    bank.save("x", tmp_path / "x")
    wanted = answers(model)
    bank.use(None)
    without = answers(model)
    report = merge(tmp_path / "base", tmp_path / "x", tmp_path / "merged")
    with silence_libraries():
        merged = getattr(transformers, kind).from_pretrained(tmp_path / "merged")
    assert merged.dtype == dtype
    assert len(report.tensors) == len(lk.Adapter.load(tmp_path / "x").pairs())
    found = answers(merged)
    effect = float((wanted - without).abs().max())
    assert effect > 1e-3
    if dtype == torch.float32:
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    else:
        paths = [tensor.path for tensor in report.tensors]
        bound = rounding_bound(merged, found, paths)
        assert float((found - wanted).abs().max()) <= bound < effect


def rounding_bound(model: Any, found: Tensor, paths: list[str]) -> float:
    """Three times what noise of the size of one rounding to bf16 does to the logits of a merged model."""
    with logits.use_fp32(model):
        for parameter in (model.get_submodule(path).weight for path in paths):
            unit = torch.finfo(torch.bfloat16).eps / 2
            parameter.data *= 1 + torch.empty_like(parameter).uniform_(-unit, unit)
        return 3 * float((answers(model) - found).abs().max())


def test_a_convolution_is_merged_as_peft_computes_it(tmp_path: Path) -> None:
    model = tiny("vit", torch.float32)
    with silence_libraries():
        model.save_pretrained(tmp_path / "base")
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["projection"], init_lora_weights=False)
    ).eval()
    tuned.save_pretrained(tmp_path / "x")
    wanted = answers(tuned)
    with tuned.disable_adapter():
        without = answers(tuned)
    merge(tmp_path / "base", tmp_path / "x", tmp_path / "merged")
    with silence_libraries():
        merged = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(answers(merged), wanted, rtol=0, atol=1e-5)
    assert float((wanted - without).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["embed_tokens"]}, r"embed_tokens\.weight with 100 rows, .* lm_head\.weight"),
        ({}, r"embed_tokens\.weight"),
    ],
    ids=["all biases", "biases of layers", "biases of pairs", "half of a larger vocabulary", "and not named"],
)
def test_what_peft_adapters_may_hold_and_is_not_merged_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    model = tiny("llama", torch.float32)
    with silence_libraries():
        model.save_pretrained(tmp_path / "base")
    if not fields or "modules_to_save" in fields:
        model.resize_token_embeddings(100)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], **fields))
    tuned.save_pretrained(tmp_path / "x", save_embedding_layers=True if not fields else "auto")
    with pytest.raises((ConfigError, AdapterError, MergeError), match=told):
        merge(tmp_path / "base", tmp_path / "x", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_a_larger_vocabulary_comes_with_its_tokenizer(tmp_path: Path, tied: bool) -> None:
    model = tiny_models.llama(tie=tied)
    base = test_merge.base_folder(tmp_path / "base", model)
    model.resize_token_embeddings(100)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], init_lora_weights=False
    )
    tuned = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_(std=0.1)
    tuned.save_pretrained(tmp_path / "x")
    tokenizer = texts.tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "x")
    ids = torch.tensor([[3, 98, 99, 5]])
    with torch.no_grad():
        wanted = tuned(input_ids=ids).logits
    merge(base, tmp_path / "x", tmp_path / "merged", allow=["untie"] if tied else [])
    with silence_libraries():
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        found = merged(input_ids=ids).logits
    assert merged.config.vocab_size == found.shape[-1] == 100
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert "<new>" in transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab()
