"""Rows of preferences, and tiny bases that learn from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora_kit.adapter.adapter import Adapter
from lora_kit.models.loading import Base
from tests.support import texts, tiny
from tests.support.training import base_of, recipe_of

PREFERENCES = [
    {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for prompt, chosen, rejected in (
        ("one ", "two", "no no"),
        ("a longer prompt ", "x", "no no no"),
        ("b ", "a longer completion", "no"),
        ("cc ", "dddd", "no no no no"),
        ("e ", "f g h", "no no"),
    )
]
FEEDBACK = [
    {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good}
    for row, good in zip(PREFERENCES, (True, False, True, True, False), strict=True)
]


def rows_for(objective: str) -> list[dict[str, Any]]:
    """Return rows that an objective learns from."""
    return FEEDBACK if objective == "kto" else PREFERENCES


def reward_base(*, seed: int = 0) -> Base:
    """Return a tiny base with a head of one label."""
    config = tiny.llama().config
    config.num_labels = 1
    torch.manual_seed(seed)
    model: Any = transformers.LlamaForSequenceClassification(config).eval()
    return Base(model=model, tokenizer=texts.tokenizer(), name="tiny", task="classify")


def base_for(objective: str) -> Base:
    """Return a tiny base of the task that an objective has."""
    return reward_base() if objective == "reward" else base_of()


def preference_recipe(folder: Path, objective: str, **changes: Any) -> dict[str, Any]:
    """Return a recipe of a few steps, without a separator, so that its tokens are those of the texts."""
    section = {"logging_steps": 1, "learning_rate": 2e-2, "per_device_train_batch_size": 2, **changes.pop("train", {})}
    options = {"rows": rows_for(objective), "lora": {"r": 4, "lora_alpha": 8}, "steps": 6, **changes}
    recipe = recipe_of(folder, objective=objective, train=section, **options)
    recipe["data"]["separator"] = ""
    return recipe


def losses_of(history: Any) -> list[float]:
    """Return the losses of a log, step by step."""
    return [entry["loss"] for entry in history if "loss" in entry]


class KeepStart:
    """Keeps what an adapter is before its first step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from lora_kit.training.job import methods

        self.adapter: Adapter | None = None
        attach = methods.attach

        def attach_and_keep(*args: Any, **kwargs: Any) -> Any:
            bank = attach(*args, **kwargs)
            self.adapter = bank.snapshot(kwargs["name"])
            return bank

        monkeypatch.setattr(methods, "attach", attach_and_keep)
