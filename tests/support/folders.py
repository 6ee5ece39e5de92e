"""Small adapters that fit the tiny Llama, and ways to write and to damage their folders."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import lora_kit as lk
from lora_kit.adapter.folder import CONFIG, WEIGHTS
from lora_kit.adapter.peft_keys import lora_weight_keys

PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
A0, B0 = lora_weight_keys(PATHS[0], "linear")


def config(**fields: Any) -> lk.LoraConfig:
    return lk.LoraConfig.from_dict({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **fields})


def tensors(*, seed: int = 0, size: int = 32, rank: int = 4) -> dict[str, Tensor]:
    """Pairs for both q_proj of the tiny Llama."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for path in PATHS:
        key_a, key_b = lora_weight_keys(path, "linear")
        made[key_a] = torch.randn(rank, size, generator=generator)
        made[key_b] = torch.randn(size, rank, generator=generator)
    return made


def adapter(*, seed: int = 0) -> lk.Adapter:
    return lk.Adapter(config(), tensors(seed=seed))


def foreign(folder: Path, values: dict[str, Tensor] | None = None, **fields: Any) -> Path:
    """An adapter folder as another tool writes it: config and weights, nothing that vouches for them."""
    folder.mkdir()
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **fields}
    (folder / CONFIG).write_text(json.dumps(plain))
    safetensors.torch.save_file(tensors() if values is None else values, folder / WEIGHTS)
    return folder


def raw(header: Any, payload: bytes = b"") -> bytes:
    """A safetensors file with any header, text or JSON value."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def taken_apart(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and payload of a safetensors file."""
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
