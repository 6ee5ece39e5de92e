"""The demo from end to end: `run` does the work in order, shows it, and fails where something is not as promised."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from lora_kit.bank.attach import attach
from lora_kit.bank.bank import AdapterBank
from lora_kit.demo import demo_training
from lora_kit.demo.demo_report import DemoReport, MixedRow, TaskResult
from lora_kit.demo.demo_screen import DemoScreen
from lora_kit.errors import StorageError, VerificationError
from lora_kit.io.atomic_write import check_output
from lora_kit.merging.merge import merge
from lora_kit.models.loading import Base
from lora_kit.models.prompt_tokens import render_prompt
from lora_kit.names import KIT_BASE
from lora_kit.torch_utils import read_peak_bytes

FIGURES: Final = "demo.json"
ROUNDING: Final = 1e-4
"""Share of the largest logit by which two orders of the same fp32 sums may differ; a hundred times what is usual."""
SWAPS: Final = 2000
_MERGED: Final = "scene"


def run(
    out: str | Path = Path("runs/demo"),
    *,
    seed: int = 0,
    steps: Mapping[str, int] = demo_training.STEPS,
    held_out: int = demo_training.HELD_OUT,
    screen: DemoScreen | None = None,
) -> DemoReport:
    """Train three adapters on kit-base, compare, swap, mix and merge them, and print what happens.

    Args:
        out: folder for everything it writes; what an earlier demo wrote there is replaced.
        seed: of data and training.
        steps: optimizer steps by task.
        held_out: rows per task to score on.
        screen: where to print; standard output by default.

    Raises:
        StorageError: `out` holds something else, or cannot be written.
        VerificationError: the merged model differs from base + adapter; or, after everything was shown and written, an
            adapter is no better than the base, or a row of the mixed batch differs from its adapter alone.
    """
    started, out, screen = time.perf_counter(), Path(out), screen or DemoScreen()
    _claim_folder(out)
    base = demo_training.load_demo_base()
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    screen.show_opening(parameters=base.model.num_parameters(), tasks=len(steps))
    tasks: dict[str, TaskResult] = {}
    for result in demo_training.train_tasks(base, out=out, seed=seed, steps=steps, held_out=held_out):
        tasks[result.task.name] = result
        screen.show_task(result)
    swap_seconds, mixed = _swap_and_mix(base, tasks, screen)
    merged = merge(KIT_BASE, out / _MERGED, out / f"{_MERGED}-merged", dtype="fp32", verify="logits", replace=True)
    screen.show_merged(_MERGED, merged)
    report = DemoReport(
        out=out,
        seed=seed,
        tasks=tasks,
        swaps=SWAPS,
        swap_seconds=swap_seconds,
        mixed=mixed,
        merged=merged,
        merged_adapter=_MERGED,
        base_parameters=base.model.num_parameters(),
        base_unchanged=all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items()),
        seconds=time.perf_counter() - started,
        peak_bytes=read_peak_bytes(base.device),
    )
    _write_figures(out, report.to_json())
    screen.show_summary(report)
    if report.failures:
        raise VerificationError("the demo is not what it should be: " + "; ".join(report.failures))
    return report


def _swap_and_mix(
    base: Base, tasks: Mapping[str, TaskResult], screen: DemoScreen
) -> tuple[float, tuple[MixedRow, ...]]:
    """Load all adapters into one bank, swap them, use them in one batch; the base is as it was afterwards."""
    bank = attach(base.model, slots=len(tasks), max_rank=demo_training.RANK)
    for name, result in tasks.items():
        bank.load(name, result.training.out)
    swap_seconds = time_swaps(bank)
    screen.show_swaps(SWAPS, swap_seconds, bank.names)
    mixed = mix_rows(base, bank, {name: result.prompts[0] for name, result in tasks.items()})
    screen.show_mixed(mixed)
    bank.detach()
    return swap_seconds, mixed


def time_swaps(bank: AdapterBank) -> float:
    """Return the median seconds of `bank.use` over all adapters of a bank and the base, which is in use afterwards."""
    names = [*bank.names, None]
    seconds = []
    for turn in range(SWAPS):
        started = time.perf_counter()
        bank.use(names[turn % len(names)])
        seconds.append(time.perf_counter() - started)
    bank.use(None)
    return statistics.median(seconds)


def mix_rows(base: Base, bank: AdapterBank, prompts: Mapping[str, str]) -> tuple[MixedRow, ...]:
    """Generate one batch with two rows per prompt: one under the adapter of that name, one under the base.

    Every row is compared with the same batch under its adapter alone.
    """
    rows = [(name, prompt) for adapter, prompt in prompts.items() for name in (adapter, None)]
    texts = [render_prompt(prompt) for _, prompt in rows]
    inputs = base.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt").to(base.device)
    with bank.rows([name for name, _ in rows]):
        mixed = _compute_logits(base, inputs)
        written = base.model.generate(**inputs, do_sample=False, max_new_tokens=demo_training.NEW_TOKENS)
    alone = {name: _compute_logits_under(base, bank, name, inputs) for name in (*prompts, None)}
    answers = base.tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return tuple(
        MixedRow(
            adapter=name,
            prompt=prompt,
            text=answers[place],
            difference=float((mixed[place] - alone[name][place]).abs().max()),
            bound=ROUNDING * float(mixed.abs().max()),
        )
        for place, (name, prompt) in enumerate(rows)
    )


def _compute_logits_under(base: Base, bank: AdapterBank, name: str | None, inputs: Mapping[str, Tensor]) -> Tensor:
    with bank.using(name):
        return _compute_logits(base, inputs)


@torch.no_grad()
def _compute_logits(base: Base, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return logits, fp32 (rows, length, vocabulary); zero at padding, where they mean nothing."""
    logits: Tensor = base.model(**inputs, use_cache=False).logits.float()
    return logits * inputs["attention_mask"][..., None]


def _claim_folder(out: Path) -> None:
    """Create the output folder with a mark in it, by which the next demo knows that it may replace this one."""
    check_output(out, replace=True, owned=lambda folder: (folder / FIGURES).is_file())
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_figures(out, {})
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error.strerror}", hint="choose another --out") from error


def _write_figures(out: Path, figures: Mapping[str, object]) -> None:
    (out / FIGURES).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
