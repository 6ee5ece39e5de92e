"""Trainings that are stopped on the way, and what two runs must have in common."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from lora_kit.models.loading import Base
from lora_kit.training.train import train
from tests.support.processes import die, in_child
from tests.support.training import At, base_of, recipe_of

TIMINGS = {"time", "seconds", "tokens_per_second", "peak_bytes"}
DROPOUT = {"lora_dropout": 0.2}


def long_recipe(folder: Path, *, steps: int = 7, **changes: Any) -> dict[str, Any]:
    """A recipe in which everything that could be lost matters: dropout, accumulation, epochs of five samples."""
    section = {"per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 3, "lr_scheduler_type": "cosine",
               "warmup_steps": 2, **changes.pop("train", {})}  # fmt: skip
    return recipe_of(folder, steps=steps, train=section, **{"lora": DROPOUT, **changes})


def results(out: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """The bytes of an adapter, and its log without what a clock said."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]
    return (out / "adapter_model.safetensors").read_bytes(), kept


def run_of(out: Path) -> Path:
    """Return the folder in which a training to `out` keeps its checkpoints."""
    return out.with_name(f"{out.name}.run")


def unbroken(recipe: dict[str, Any], base: Callable[[], Base] = base_of) -> tuple[bytes, list[dict[str, Any]]]:
    """Return the results of the same recipe, run without a stop in a folder of its own."""
    out = Path(recipe["out"]).with_name("unbroken")
    train({**recipe, "out": str(out)}, base=base())
    return results(out)


def killed(recipe: dict[str, Any], *callbacks: Any, base: Callable[[], Base] = base_of, **how: Any) -> None:
    """Train in a process of its own that is killed on the way."""
    assert in_child(lambda: train(recipe, base=base(), callbacks=callbacks, **how)) == -signal.SIGKILL


def die_at(step: int) -> At:
    """Return a callback that kills the process at the end of a step."""
    return At(step, lambda _: die())


class SignalAt(transformers.TrainerCallback):
    """Sends this process signals at a moment of the step of a number."""

    def __init__(self, step: int, *numbers: int, moment: str = "on_step_begin") -> None:
        self.step, self.numbers = step, numbers
        setattr(self, moment, self.send)

    def send(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)
