"""The demo from end to end: `run` does the work in order, shows it, and fails where something is not as promised."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lora_kit.demo import demo_steps
from lora_kit.demo.demo_results import DemoReport, Trained
from lora_kit.demo.picture import draw
from lora_kit.demo.show import Show
from lora_kit.errors import StorageError, VerificationError
from lora_kit.io.atomic_write import check_output

FIGURES: Final = "demo.json"
PICTURE: Final = "demo.png"
_MERGED: Final = "scene"
_COMPARED: Final = 16
"""Held-out prompts on which the merged model is compared."""


def run(
    out: str | Path = Path("runs/demo"),
    *,
    seed: int = 0,
    steps: Mapping[str, int] = demo_steps.STEPS,
    held_out: int = demo_steps.HELD_OUT,
    show: Show | None = None,
) -> DemoReport:
    """Train three adapters on kit-base, compare, swap, mix and merge them, and print what happens.

    Args:
        out: folder for everything it makes; what an earlier demo made there is replaced.
        seed: of data and training.
        steps: optimiser steps by task.
        held_out: rows per task to score on.
        show: where to print; the console by default.

    Raises:
        StorageError: `out` holds something else, or cannot be written.
        VerificationError: an adapter is no better than the base, a row of the mixed batch differs from its adapter
            alone, or the merged model from base + adapter. Everything was shown and written before.
    """
    started, out, show = time.perf_counter(), Path(out), show or Show()
    _claim(out)
    base = demo_steps.load()
    before = demo_steps.digest(base)
    show.opening(parameters=base.model.num_parameters(), seconds=time.perf_counter() - started, tasks=len(steps))
    trained: dict[str, Trained] = {}
    for found in demo_steps.train_all(base, out=out, seed=seed, steps=steps, held_out=held_out):
        show.trained(found)
        trained[found.task.name] = found
    with demo_steps.with_adapters(base, {name: out / name for name in trained}) as bank:
        swaps = demo_steps.time_swaps(bank)
        show.swaps(swaps, bank.names)
        mixed = demo_steps.mix(base, bank, {name: found.prompts[0] for name, found in trained.items()})
        show.mixed(mixed)
        prompts, merged_folder = trained[_MERGED].prompts[:_COMPARED], out / f"{_MERGED}-merged"
        merged = demo_steps.merge_one(base, bank, _MERGED, adapter=out / _MERGED, out=merged_folder, prompts=prompts)
        show.merged(merged)
    report = DemoReport(
        out=out,
        seed=seed,
        trained=trained,
        swaps=swaps,
        mixed=mixed,
        merged=merged,
        base_parameters=base.model.num_parameters(),
        base_unchanged=demo_steps.digest(base) == before,
        seconds=time.perf_counter() - started,
        peak_bytes=demo_steps.peak_bytes(),
        picture=draw(trained, out / PICTURE),
    )
    _finish(report, show)
    return report


def _finish(report: DemoReport, show: Show) -> None:
    _write_figures(report.out, report.to_json())
    show.summary(report)
    show.closing(report, {name: found.prompts[0] for name, found in report.trained.items()})
    if report.failures:
        raise VerificationError("the demo is not what it should be: " + "; ".join(report.failures))


def _claim(out: Path) -> None:
    """Make the output folder and leave a mark in it, by which the next demo knows that it may replace this one."""
    check_output(out, replace=True, owned=lambda folder: (folder / FIGURES).is_file())
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_figures(out, {})
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error.strerror}", hint="choose another --out") from error


def _write_figures(out: Path, figures: Mapping[str, Any]) -> None:
    (out / FIGURES).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
