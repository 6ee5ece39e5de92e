"""Bases and adapters as folders to merge, ways to damage them, and what a merge must leave alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import lora_kit as lk
from lora_kit.errors import (
    MergeError,
    VerificationError,
)
from lora_kit.merging import merge as run
from lora_kit.merging.merge import merge
from lora_kit.merging.planned_tensors import MergePlan, PlannedTensor
from lora_kit.models.loading import load_base
from tests.support import texts

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""Every linear layer of a Llama block."""


def base_folder(folder: Path, model: Any) -> Path:
    """A base as a folder, tokenizer and all."""
    model.save_pretrained(folder)
    texts.tokenizer().save_pretrained(folder)
    return folder


def adapter_folder(base: Path, folder: Path, *, task: str = "causal-lm", **fields: Any) -> Path:
    """A random adapter for a base, with deltas large enough to be seen in bf16."""
    loaded = load_base(base, task=task, num_labels=3 if task == "classify" else None)
    given = {"r": 4, "lora_alpha": 16, "init_lora_weights": False, "task_type": "CAUSAL_LM", **fields}
    bank = lk.attach(loaded.model, lk.LoraConfig.from_dict(given), name=folder.name)
    torch.manual_seed(1)
    with torch.no_grad():
        for leaf in bank.parameters(folder.name):
            leaf.copy_(torch.randn_like(leaf) * 0.05)
    bank.save(folder.name, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def beside(folder: Path) -> set[str]:
    """Names in the folder around one, hidden ones too: nothing half-made may be among them."""
    return {path.name for path in folder.parent.iterdir()}


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor in a folder's weight files, as safetensors reads them."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: t for file in files for name, t in safetensors.torch.load_file(file).items()}


def edited(monkeypatch: pytest.MonkeyPatch, edit: Callable[[MergePlan], MergePlan]) -> None:
    """Let every plan be another one."""
    real = run.plan_merge
    monkeypatch.setattr(run, "plan_merge", lambda *given, **named: edit(real(*given, **named)))


def changed(plan: MergePlan, edit: Callable[[PlannedTensor], PlannedTensor | None]) -> MergePlan:
    """Return a plan whose entries were edited; those edited to None are left out."""
    shards = tuple((shard, tuple(filter(None, map(edit, entries)))) for shard, entries in plan.shards)
    return dataclasses.replace(plan, shards=shards)


def refused(base: Path, adapter: Path, out: Path, **how: Any) -> str:
    """What a merge says as it fails; nothing is left of it."""
    around = beside(base)
    with pytest.raises((MergeError, VerificationError)) as caught:
        merge(base, adapter, out, **how)
    assert beside(base) == around
    return f"{type(caught.value).__name__}: {caught.value}"
