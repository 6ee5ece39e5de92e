"""Several processes train what one would: the same rows in a step, the same numbers, one output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kit.adapter.adapter import Adapter
from lora_kit.training.train import train
from tests.support.interrupted import results, run_of
from tests.support.training import PAIRS, base_of, recipe_of
from tests.support.worlds import in_processes

ROWS = [*PAIRS, *({"prompt": word, "completion": "x y " * n} for word, n in (("g", 9), ("hi", 1), ("j", 4), ("k", 2)))]
COMPARED = ("step", "loss", "grad_norm", "eval_loss", "train_loss", "tokens")
SGD = {"optim": "sgd", "learning_rate": 0.5, "logging_steps": 1}


def recipe_for(folder: Path, processes: int, *, size: int = 4, **changes: Any) -> dict[str, Any]:
    """Return a recipe whose steps have twice as many rows as `size`, however many processes share them."""
    section = {"per_device_train_batch_size": size // processes, "gradient_accumulation_steps": 2, **SGD,
               **changes.pop("train", {})}  # fmt: skip
    out = str(folder / f"out-{processes}")
    return recipe_of(folder, rows=changes.pop("rows", ROWS), train=section, out=out, **changes)


def train_in(processes: int, recipe: dict[str, Any], kind: str = "llama") -> Any:
    """Return the reports, or the errors, of all processes; of one process its report."""

    def work() -> Any:
        return train(recipe, base=base_of(kind, **({"labels": 2} if kind == "bert" else {}))).out

    return in_processes(work, size=processes)


def assert_same_adapter(first: Path, second: Path, *, within: float = 1e-6) -> None:
    expected, found = Adapter.load(first).tensors, Adapter.load(second).tensors
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=within)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_adapter_and_the_log_are_those_of_one_process(tmp_path: Path, processes: int) -> None:
    """Nine rows in batches of four, windows of two: the last window of an epoch has one row."""
    alone, together = recipe_for(tmp_path, 1), recipe_for(tmp_path, processes)
    outs = [Path(recipe["out"]) for recipe in (alone, together)]
    assert train_in(1, alone) == outs[:1]
    assert train_in(processes, together) == [outs[1]] * processes
    assert_same_adapter(*outs)
    logs = [[{key: line.get(key) for key in COMPARED} for line in results(out)[1]] for out in outs]
    assert len(logs[0]) == len(logs[1])
    for lines in zip(*logs, strict=True):
        assert lines[1] == pytest.approx(lines[0], abs=1e-5)
    assert not run_of(outs[1]).exists()
