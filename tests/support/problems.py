"""Texts with several labels, with numbers and with weights, and tiny bases that learn them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from torch import nn

from lora_kit.models.loading import Base
from tests.support import texts, tiny
from tests.support.training import recipe_of

SETS = [
    {"text": "ab", "labels": ["a", "b"]},
    {"text": "a longer text", "labels": ["a"]},
    {"text": "none of them", "labels": []},
    {"text": "b", "labels": ["b"]},
    {"text": "c and b", "labels": ["b", "c"]},
]
NUMBERS = [
    {"text": "ab", "label": 0.5},
    {"text": "a longer text", "label": -1.25},
    {"text": "none of them", "label": 2},
    {"text": "b", "label": -100.0},
    {"text": "c and b", "label": 0.0},
]
SINGLE = [{"text": row["text"], "label": label} for row, label in zip(SETS, "xyxzx", strict=True)]
ROWS: dict[str, list[dict[str, Any]]] = {"single-label": SINGLE, "multi-label": SETS, "regression": NUMBERS}
SIZES = {"single-label": 3, "multi-label": 3, "regression": 1}


def steady_base(problem: str = "single-label", *, tokenizer: Any = None) -> Base:
    """A tiny BERT without dropout and with as many outputs as the problem has in `ROWS`."""
    model: Any = tiny.bert(labels=SIZES[problem])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return Base(model=model, tokenizer=tokenizer or texts.bert_tokenizer(), name="tiny", task="classify")


def one_step(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A recipe of one plain gradient step over all rows, in micro-batches of two."""
    section = {
        "optim": "sgd",
        "learning_rate": 0.5,
        "max_grad_norm": 1e9,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": -(-len(rows) // 2),
    }
    return recipe_of(folder, rows=rows, steps=1, train=section, task="classify", method="full", **changes)


def learnable_rows(problem: str, count: int, *, seed: int) -> list[dict[str, Any]]:
    """Texts of eight letters; which letters occur, and how often, decides the labels or the number."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        text = "".join(draw.choice("abcd") for _ in range(8))
        if problem == "multi-label":
            rows.append({"text": text, "labels": [name for name in "ab" if text.count(name) >= 2]})
        else:
            rows.append({"text": text, "label": text.count("a") / 4 - 0.5 + 0.25 * text.count("b")})
    return rows
