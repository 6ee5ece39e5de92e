"""Merged equals unmerged in every family: saved, merged by files, loaded again by transformers, the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
from tests.support import merging, texts
from tests.support import tiny as tiny_models
from tests.support.merge_families import FIELDS, PICTURES, TASKS, tiny


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
    base = merging.base_folder(tmp_path / "base", model)
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


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    model = tiny_models.llama()
    base = merging.base_folder(tmp_path / "base", model)
    model.resize_token_embeddings(80)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "x")
    with pytest.raises(MergeError, match=r"80 rows, and the tokenizer has tokens up to \d+"):
        merge(base, tmp_path / "x", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").unlink()
    merge(base, tmp_path / "x", tmp_path / "merged")


WAVES: dict[str, Any] = {
    "conv_dim": (8, 8),
    "conv_stride": (4, 4),
    "conv_kernel": (4, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
LAYERS: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VISION: dict[str, Any] = {**LAYERS, "image_size": 16, "patch_size": 8}
TEXT: dict[str, Any] = {**LAYERS, "vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WITHOUT_EMBEDDING: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "CLIP": ("CLIPModel", {"text_config": TEXT, "vision_config": VISION}, ["q_proj", "fc1"]),
    "ResNet": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]},
        ["classifier.1"],
    ),
    "Wav2Vec2": ("Wav2Vec2ForCTC", {**LAYERS, **WAVES}, ["q_proj", "lm_head"]),
    "HuBERT": ("HubertForSequenceClassification", {**LAYERS, **WAVES}, ["q_proj", "projector"]),
    "ViT": ("ViTForImageClassification", VISION, ["q_proj", "fc1"]),
}


@pytest.mark.parametrize("family", WITHOUT_EMBEDDING)
def test_a_base_without_an_input_embedding_is_merged(tmp_path: Path, family: str) -> None:
    kind, fields, names = WITHOUT_EMBEDDING[family]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, kind).config_class(**fields))
    model.save_pretrained(tmp_path / "base")
    head = ["classifier"] if family in ("HuBERT", "ViT") else []
    config = lk.LoraConfig(r=2, target_modules=names, modules_to_save=head, init_lora_weights=False)
    bank = lk.attach(model, config, name="x")
    bank.save("x", tmp_path / "x")
    bank.merge("x")
    bank.detach()
    lk.export(tmp_path / "x", "merged", tmp_path / "merged", base=tmp_path / "base")
    merged = getattr(transformers, kind).from_pretrained(tmp_path / "merged").state_dict()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(merged[key], tensor, rtol=1e-6, atol=1e-7)
