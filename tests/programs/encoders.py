"""A tiny encoder for sentence-transformers: adapters of ours that it loads, and adapters that it saves."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers

import lora_kit as lk
from lora_kit.models.silence import silence_libraries
from tests.programs.cases import Case, compute_outputs, make_adapter
from tests.programs.logit_checks import READERS

_NAME: Final = "bert"
_CONFIG: Final = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
}
_FEATURES: Final[Mapping[str, Mapping[str, Any]]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank-pattern": {"rank_pattern": {"query": 2}, "alpha_pattern": {"query": 3}},
    "embedding": {"target_modules": ["query", "word_embeddings"]},
    "dora": {"use_dora": True},
}


def make_encoders(cases: Sequence[Case], python: Path, folder: Path) -> list[Case]:
    """Write an encoder with kit-base's tokenizer, and adapters of it as our bank saves them."""
    base, model, alone = _make_base(cases, folder)
    tokens, made = cases[0].tokens, [Case(_NAME, None, base, None, cases[0].tokens, alone, 0.0)]
    for feature, fields in _FEATURES.items():
        adapter, states = make_adapter(model, fields, tokens, alone)
        adapter.save(folder / "adapters" / feature)
        effect = float(np.abs(states - alone).max())
        made.append(Case(_NAME, feature, base, folder / "adapters" / feature, tokens, states, effect))
    return made


def add_with_sentence_transformers(cases: Sequence[Case], python: Path, folder: Path) -> list[Case]:
    """Let sentence-transformers add adapters to an encoder and save it; return what we read of its folder."""
    base, model, alone = _make_base(cases, folder)
    made = []
    for kind in ("lora", "rslora"):
        out = folder / "saved" / kind
        command = [python, READERS / "add_with_sentence_transformers.py", base, out, kind]
        subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
        states = compute_outputs(model, cases[0].tokens, lk.Adapter.load(out))
        effect = float(np.abs(states - alone).max())
        made.append(Case(_NAME, f"{kind}-saved-there", base, out, cases[0].tokens, states, effect))
    return made


def _make_base(cases: Sequence[Case], folder: Path) -> tuple[Path, torch.nn.Module, np.ndarray]:
    """Write the encoder; return its folder, itself and what it computes without an adapter."""
    base = folder / "base"
    tokenizer = transformers.AutoTokenizer.from_pretrained(cases[0].base_folder)
    config = transformers.BertConfig(**_CONFIG, vocab_size=len(tokenizer))
    torch.manual_seed(5)
    with silence_libraries():
        model = transformers.BertModel(config).to(torch.float32).eval()
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
    return base, model, compute_outputs(model, cases[0].tokens)
