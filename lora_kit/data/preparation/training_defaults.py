"""The `train` section of the recipe that `prepare` writes: good without tuning on a few hundred to some thousand rows.

The learning rate of LoRA falls with the width of the model, as 5e-4 · (2000 / width)^0.776 (Schulman and Thinking
Machines Lab 2025, "LoRA Without Regret"); labels are learned at about half of that, after a warm-up. A new head is
random at first and learns ten times as fast. Few rows are gone through more often, so that there are some hundred
steps at least, and twice as often where there are few of each label. `benchmarks/prepared_recipes.py` measures it.
"""

from __future__ import annotations

import math
from typing import Final

from lora_kit.models.tasks import LABEL_TASKS

ANSWERS: Final = 8
"""Answers of the model to a prompt, where functions reward them: TRL's default."""
BATCH_SIZE: Final = 8
_WIDTH: Final = 2000
_RATE: Final = 5e-4
"""The learning rate at `_WIDTH`."""
_LABEL_RATE: Final = 2.8e-4
"""The same where labels are learned."""
_LABEL_WARMUP: Final = 0.1
"""Share of the steps in which the rates of labels rise: a new head would throw the adapter off at first."""
_EXPONENT: Final = 0.776
_NARROWEST: Final = 128
"""Of narrower bases, the learning rate is that of this width."""
_HEAD_FACTOR: Final = 10
_MIN_STEPS: Final = 200
_EPOCHS: Final = (3, 10)
"""Fewest and most epochs."""
_FEW_ROWS: Final = 10
"""With fewer rows for each label there are twice as many epochs."""


def choose_train_section(*, rows: int, task: str, hidden_size: int | None, labels: int = 0) -> dict[str, object]:
    """Return the `train` section for so many training rows.

    Args:
        hidden_size: width of the base; None where its config does not say it.
        labels: how many labels the rows have.
    """
    has_labels = task in LABEL_TASKS
    rate = choose_learning_rate(hidden_size, has_labels=has_labels)
    head = {"head_learning_rate": _round_to_digit(_HEAD_FACTOR * rate), "warmup_steps": _LABEL_WARMUP}
    return {
        "num_train_epochs": choose_epochs(rows, labels=labels),
        "per_device_train_batch_size": BATCH_SIZE,
        "learning_rate": rate,
        **(head if has_labels else {}),
        "seed": 0,
    }


def choose_generation_section(answer_tokens: object) -> dict[str, object]:
    """Return what `train` says besides where the model answers prompts itself: a batch is two prompts."""
    sizes = dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 2 * ANSWERS)
    return {"num_generations": ANSWERS, "max_completion_length": answer_tokens, **sizes}


def choose_epochs(rows: int, *, labels: int = 0) -> int:
    """Return the fewest epochs that make `_MIN_STEPS` steps, within `_EPOCHS`; twice as many for few rows a label."""
    steps = max(1, math.ceil(rows / BATCH_SIZE))
    fewest, most = _EPOCHS
    epochs = min(most, max(fewest, math.ceil(_MIN_STEPS / steps)))
    return 2 * epochs if rows < _FEW_ROWS * labels else epochs


def choose_learning_rate(hidden_size: int | None, *, has_labels: bool = False) -> float:
    """Return the learning rate for a base of this width, to one digit."""
    width = max(_NARROWEST, hidden_size or _WIDTH)
    return _round_to_digit((_LABEL_RATE if has_labels else _RATE) * (_WIDTH / width) ** _EXPONENT)


def _round_to_digit(value: float) -> float:
    return float(f"{value:.0e}")
