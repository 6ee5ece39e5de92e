"""The `train` section of the recipe that `prepare` writes: good without tuning on a few hundred to some thousand rows.

The learning rate of LoRA falls with the width of the model, as 5e-4 · (2000 / width)^0.776 (Schulman and Thinking
Machines Lab 2025, "LoRA Without Regret"). A new head is random at first and learns ten times as fast. Few rows are gone
through more often, so that there are some hundred steps at least. `benchmarks/prepared_recipes.py` measures it.
"""

from __future__ import annotations

import math
from typing import Final

from lora_kit.models.tasks import LABEL_TASKS

BATCH_SIZE: Final = 8
_WIDTH: Final = 2000
_RATE: Final = 5e-4
"""The learning rate at `_WIDTH`."""
_EXPONENT: Final = 0.776
_NARROWEST: Final = 128
"""Of narrower bases, the learning rate is that of this width."""
_HEAD_FACTOR: Final = 10
_MIN_STEPS: Final = 200
_EPOCHS: Final = (3, 10)
"""Fewest and most epochs."""


def choose_train_section(*, rows: int, task: str, hidden_size: int | None) -> dict[str, object]:
    """Return the `train` section for so many training rows.

    Args:
        hidden_size: width of the base; None where its config does not say it.
    """
    rate = choose_learning_rate(hidden_size)
    head = {"head_learning_rate": _round_to_digit(_HEAD_FACTOR * rate)} if task in LABEL_TASKS else {}
    return {
        "num_train_epochs": choose_epochs(rows),
        "per_device_train_batch_size": BATCH_SIZE,
        "learning_rate": rate,
        **head,
        "seed": 0,
    }


def choose_epochs(rows: int) -> int:
    """Return the fewest epochs that make `_MIN_STEPS` steps, within `_EPOCHS`."""
    steps = max(1, math.ceil(rows / BATCH_SIZE))
    fewest, most = _EPOCHS
    return min(most, max(fewest, math.ceil(_MIN_STEPS / steps)))


def choose_learning_rate(hidden_size: int | None) -> float:
    """Return the learning rate for a base of this width, to one digit."""
    width = max(_NARROWEST, hidden_size or _WIDTH)
    return _round_to_digit(_RATE * (_WIDTH / width) ** _EXPONENT)


def _round_to_digit(value: float) -> float:
    return float(f"{value:.0e}")
