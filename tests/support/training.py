"""Tiny bases and recipes to train, and what is compared of them before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from lora_kit.models.loading import Base
from lora_kit.training.results import TrainReport
from tests.support import texts, tiny

PAIRS = [
    {"prompt": "one", "completion": "two"},
    {"prompt": "a longer prompt", "completion": "x"},
    {"prompt": "b", "completion": "a longer completion"},
    {"prompt": "cc", "completion": "dddd"},
    {"prompt": "e", "completion": "f g h"},
]
LABELED = [{"text": word * n, "label": label} for word, label in (("good ", "yes"), ("bad ", "no")) for n in (1, 2, 3)]


def base_of(kind: str = "llama", **settings: Any) -> Base:
    """Return a tiny base with random weights, its tokenizer beside it."""
    task = "classify" if kind == "bert" else "causal-lm"
    tokenizer = texts.bert_tokenizer() if kind == "bert" else texts.tokenizer()
    make: Any = tiny.MODELS[kind]
    model = make(**settings)
    return Base(model=model, tokenizer=tokenizer, name="tiny", task=task)


def recipe_of(folder: Path, *, rows: list[dict[str, Any]] = PAIRS, steps: int = 3, **changes: Any) -> dict[str, Any]:
    """Return a recipe of a few steps; its rows are written into the folder and serve for validation, too."""
    file = str(texts.write(folder / "rows.jsonl", rows))
    section = {"max_steps": steps, "learning_rate": 1e-2, "per_device_train_batch_size": 4, **changes.pop("train", {})}
    data = {"train": file, "validation": file}
    return {"base": "tiny", "data": data, "out": str(folder / "out"), "train": section, **changes}


def state(model: Any) -> dict[str, torch.Tensor]:
    """Return a copy of the state dict."""
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def same_state(model: Any, before: Mapping[str, torch.Tensor]) -> bool:
    """Return whether keys and bits are those of an earlier `state`."""
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[key], before[key]) for key in before)


def weights_of(report: TrainReport) -> bytes:
    """Return the bytes of the adapter that a training wrote."""
    return (report.out / "adapter_model.safetensors").read_bytes()


class At(transformers.TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step: int, action: Callable[[Any], None]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action(kwargs["model"])
