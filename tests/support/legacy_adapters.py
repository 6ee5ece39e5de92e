"""Adapters under the module names of transformers 4, and tiny models of the families that they are for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from lora_kit.adapter.folder import CONFIG, WEIGHTS
from lora_kit.adapter.peft_keys import PREFIX
from lora_kit.io.safetensors import encode_safetensors
from tests.support.merge_families import SIZES

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def llava() -> Any:
    text = transformers.LlamaConfig(**SIZES)
    config = transformers.LlavaConfig(
        text_config=text, vision_config=transformers.CLIPVisionConfig(**VISION), image_token_id=95
    )
    return transformers.LlavaForConditionalGeneration(config)


def gemma3() -> Any:
    text = transformers.Gemma3TextConfig(**SIZES, head_dim=8)
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(**VISION).to_dict(),
        mm_tokens_per_image=4,
        image_token_id=95,
        boi_token_id=94,
        eoi_token_id=93,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def paligemma() -> Any:
    text = transformers.GemmaConfig(**SIZES, head_dim=8)
    vision = transformers.SiglipVisionConfig(**VISION, projection_dim=32)
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_id=95, projection_dim=32, hidden_size=32
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)
    )


def qwen2_moe() -> Any:
    config = transformers.Qwen2MoeConfig(
        **SIZES, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40
    )
    return transformers.Qwen2MoeForCausalLM(config)


def qwen3_moe() -> Any:
    config = transformers.Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24
    )
    return transformers.Qwen3MoeForCausalLM(config)


def attention(prefix: str, *names: str) -> dict[str, tuple[int, int]]:
    """The shapes (in, out) of these projections of two layers."""
    widths = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32)}
    return {f"{prefix}.{layer}.self_attn.{name}": widths[name] for layer in range(2) for name in names}


def experts(block: str, names: tuple[str, str, str], width: int) -> dict[str, tuple[int, int]]:
    """The shapes (in, out) of three experts of two layers: gate, up and down."""
    gate, up, down = names
    return {
        f"model.layers.{layer}.{block}.experts.{expert}.{name}": (width, 32) if name == down else (32, width)
        for layer in range(2)
        for expert in range(3)
        for name in (gate, up, down)
    }


TEXT = "language_model.model.layers"
MIXTRAL = experts("block_sparse_moe", ("w1", "w3", "w2"), 48)
QWEN = experts("mlp", ("gate_proj", "up_proj", "down_proj"), 24)
ROUTER = {f"model.layers.{layer}.block_sparse_moe.gate": (32, 3) for layer in range(2)}


def write(folder: Path, shapes: dict[str, tuple[int, int]], **fields: Any) -> Path:
    """An adapter as PEFT wrote it on transformers 4."""
    generator, tensors = torch.Generator().manual_seed(3), dict[str, Tensor]()
    for path, (width, height) in shapes.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.randn(4, width, generator=generator) / 4
        tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.randn(height, 4, generator=generator) / 4
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **fields}))
    (folder / WEIGHTS).write_bytes(b"".join(encode_safetensors(tensors)))
    return folder
