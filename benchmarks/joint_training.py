"""Does it pay to train several adapters in one pass, beside one after another?

Eight adapters of rank 8 on every linear layer of the embedded base, fp32, one thread. CPU time of their steps by
`lk.train`, measured for one of them, over that by `lk.train_many`: with all eight at once in every forward, and with
as many as it measured to be quickest. Steps in which it still measures are left out.

    python -m benchmarks.joint_training --write    # results and README.md
    python -m benchmarks.joint_training --only "1 × 256"   # one row, into both
    python -m benchmarks.joint_training --memory   # the memory alone, into both; it needs no quiet machine
    python -m benchmarks.joint_training --table    # README.md from the result, nothing else
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers

import lora_kit as lk
from benchmarks.harness import (
    MEMORY_IN_USE,
    README,
    RESULTS,
    environment,
    fill,
    in_own_process,
    peak_bytes,
    quiet,
    table,
)
from lora_kit.training.together.driver import JointDriver
from lora_kit.training.together.group_size import GroupSize

RESULT: Final = RESULTS / "joint_training.json"
MARK: Final = "joint_training"
ADAPTERS: Final = 8
SIZES: Final = {f"{rows} × {tokens}": (rows, tokens) for rows, tokens in ((1, 16), (1, 64), (4, 64), (1, 256))}
"""Rows of a batch, and tokens of a row, of each adapter."""
STEPS: Final = 6
"""Steps of each adapter that count, at the end of its training."""
MEASURING: Final = 11
"""Steps before them: `train_many` tries every number of adapters twice."""


def recipes_of(folder: Path, rows: int, tokens: int, steps: int) -> list[dict[str, Any]]:
    """Return a recipe for each adapter, with rows of its own that have as many tokens as they should."""
    tokenizer = lk.load_base("kit-base").tokenizer
    recipes = []
    for adapter in range(ADAPTERS):
        ids = torch.randint(300, 3000, (40 * tokens,), generator=torch.manual_seed(adapter))
        data = folder / f"{adapter}.jsonl"  # one long text, which becomes samples of `tokens` tokens
        data.write_text(json.dumps({"text": tokenizer.decode(ids)}) + "\n")
        section = {
            "max_steps": steps,
            "per_device_train_batch_size": rows,
            "learning_rate": 1e-3,
            "save_strategy": "no",
        }
        recipes.append({
            "base": "kit-base",
            "data": {"train": str(data), "max_length": tokens},
            "lora": {"r": 8, "target_modules": "all-linear"},
            "train": {**section, "logging_steps": steps, "report_to": "none", "seed": adapter},
            "out": str(folder / f"adapter-{adapter}"),
        })  # fmt: skip
    return recipes


class _StepEnds(transformers.TrainerCallback):
    """CPU time at the end of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.process_time())


def solo_seconds(recipe: dict[str, Any], base: Any) -> float:
    """Return the CPU time of the steps that count of one training; the others are like it."""
    ends = _StepEnds()
    lk.train(recipe, base=base, callbacks=[ends], replace=True)
    return ends.times[-1] - ends.times[-1 - STEPS]


@contextmanager
def _without_reports() -> Iterator[None]:
    """Leave out the pictures and samples of reports, which take longer than these trainings."""
    with ExitStack() as stack:
        for place, value in (
            ("artifacts.plot_loss_curve", lambda *_, **__: None),
            ("train_page.can_plot", lambda: False),
            ("samples.SAMPLE_COUNT", 0),
        ):
            stack.enter_context(patch(f"lora_kit.training.report.{place}", value))
        yield


@contextmanager
def _record_groups(size: int | None) -> Iterator[list[tuple[float, int]]]:
    """Record when each group has been computed, and how many adapters it had; all of one size, where that is given."""
    records: list[tuple[float, int]] = []
    run: Callable[..., None] = JointDriver._run_group

    def note(driver: JointDriver, group: Any) -> None:
        run(driver, group)
        records.append((time.process_time(), len(group)))

    with ExitStack() as stack:
        stack.enter_context(patch.object(JointDriver, "_run_group", note))
        if size is not None:
            stack.enter_context(patch.object(GroupSize, "choose", lambda _, active: min(size, active)))
        yield records


def joint_seconds(recipes: list[dict[str, Any]], base: Any, size: int | None) -> tuple[float, int]:
    """Return the CPU time of the steps that count, in one pass, and how many adapters were computed at once."""
    with _record_groups(size) as records:
        lk.train_many(recipes, base=base, replace=True)
    end = start = len(records)
    for count, steps in ((1, 0), (STEPS, 0)):  # the last step of each is followed by what ends its training
        end = start
        while steps < count * ADAPTERS:
            start -= 1
            steps += records[start][1]
    return records[end - 1][0] - records[start - 1][0], records[end - 1][1]


def measure(rows: int, tokens: int) -> dict[str, Any]:
    """Return tokens a second of each way, by CPU time."""
    quiet()
    torch.set_num_threads(1)
    base = lk.load_base("kit-base", dtype="fp32")
    count = STEPS * ADAPTERS * rows * tokens
    with tempfile.TemporaryDirectory() as folder, _without_reports():
        recipes = recipes_of(Path(folder), rows, tokens, MEASURING + STEPS + 1)
        solo = ADAPTERS * solo_seconds(recipes[0], base)
        joint, _ = joint_seconds(recipes, base, ADAPTERS)
        chosen, size = joint_seconds(recipes, base, None)
    return {
        "one_after_another": count / solo,
        "all_at_once": count / joint,
        "as_measured": count / chosen,
        "chosen": size,
        "all_ratio": solo / joint,
        "measured_ratio": solo / chosen,
    }


def measure_base() -> int:
    """Return the bytes of the base, which every training has."""
    return sum(tensor.nbytes for tensor in lk.load_base("kit-base", dtype="fp32").model.parameters())


def measure_memory(adapters: int) -> int:
    """Return the peak memory of training so many adapters at once above the base's, in bytes."""
    quiet()
    torch.set_num_threads(1)
    base = lk.load_base("kit-base", dtype="fp32")
    with tempfile.TemporaryDirectory() as folder, _without_reports():
        recipes = recipes_of(Path(folder), 1, 64, 2)
        lk.train(recipes[-1], base=base)  # what a first training of a process costs
        return peak_bytes(lambda: lk.train_many(recipes[:adapters], base=base, replace=True))


def measure_all() -> dict[str, Any]:
    rows = {label: in_own_process(measure, *size) for label, size in SIZES.items()}
    return {"rows": rows, "memory": measure_all_memory(), **environment()}


def measure_all_memory() -> dict[str, int]:
    """Return the bytes of the base, and the peaks above it with one adapter and with all."""
    peaks = {str(count): in_own_process(measure_memory, count, environment=MEMORY_IN_USE) for count in (1, ADAPTERS)}
    return {"base": in_own_process(measure_base), **peaks}


def page(result: Mapping[str, Any]) -> str:
    """Return the section of README.md."""
    head = ["rows × tokens of each", "one after another", "all eight at once", "as measured", "at once, chosen"]
    lines = [
        [
            label,
            f"{row['one_after_another']:,.0f} tokens/s",
            f"{row['all_ratio']:.2f} ×",
            f"{row['measured_ratio']:.2f} ×",
            str(row["chosen"]),
        ]
        for label, row in result["rows"].items()
    ]
    if "memory" not in result:
        return table(head, lines)
    base, one, eight = (result["memory"][count] / 1e6 for count in ("base", "1", str(ADAPTERS)))
    share = (base + eight) / (1.3 * base + ADAPTERS * one)
    memory = (
        f"Memory at the peak, 1 × 64, above a base of {base:,.0f} MB: {one:,.0f} MB for one adapter, {eight:,.0f} MB "
        f"for eight at once. The eight with their base take {share:.2f} of 1.3 bases and eight times one."
    )
    return f"{table(head, lines)}\n\n{memory}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the result and README.md")
    parser.add_argument("--table", action="store_true", help="write README.md from the result")
    parser.add_argument("--only", choices=list(SIZES), help="measure this row alone, and write it into both")
    parser.add_argument("--memory", action="store_true", help="measure the memory alone, and write it into both")
    arguments = parser.parse_args()
    is_kept = arguments.table or arguments.memory or arguments.only
    result = json.loads(RESULT.read_text(encoding="utf-8")) if is_kept else measure_all()
    if arguments.memory:
        result["memory"] = measure_all_memory()
    if arguments.only:
        rows = {**result["rows"], arguments.only: in_own_process(measure, *SIZES[arguments.only])}
        result["rows"] = {label: rows[label] for label in SIZES if label in rows}
    print(page(result))
    if arguments.write or arguments.memory or arguments.only:
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if arguments.write or is_kept:
        fill(README, page(result), mark=MARK)


if __name__ == "__main__":
    main()
