"""`sweep`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lora_kit.cli.app import AsJson, Replace, app
from lora_kit.cli.output import print_json, print_table
from lora_kit.cli.train import parse_recipe_flags

if TYPE_CHECKING:
    from lora_kit.sweeps.sweep_report import SweepReport, TrialReport

_OVER_HELP = "KEY=VALUE,VALUE or KEY=LOW..HIGH or KEY=LOW..HIGH:log; may be repeated."


@app.command(usage="Usage: lora-kit sweep RECIPE --over KEY=VALUES [OPTIONS] [--KEY VALUE ...]")
def sweep(
    recipe: Path,
    /,
    *flags: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    over: Annotated[list[str], Parameter(negative="", help=_OVER_HELP)],
    method: str | None = None,
    metric: str | None = None,
    trials: int | None = None,
    seed: int | None = None,
    prune: str | None = None,
    keep: str = "best",
    workers: int = 1,
    replace: Replace = False,
    json: AsJson = False,
) -> None:
    """Train with many values of some keys and keep the best result.

    The same command continues a sweep that was stopped; run twice at once, the two share the trials. Any key of the
    recipe is a flag here too, for all trials.

    Args:
        recipe: The recipe's file.
        method: grid, random or tpe (Bayesian); by default grid where every key has a list, else tpe.
        metric: Metric on the validation rows by which trials are compared: loss, perplexity, accuracy, f1, bleu, ...
        trials: Number of trials; by default all of a grid, else 20.
        seed: Seed of the values that are drawn; by default the seed of the recipe.
        prune: median, which stops a trial that is worse at an evaluation than half of the others were then.
        keep: best; or all, which leaves the results of all trials in the folder of the sweep.
        workers: Processes that share the trials.
    """
    from lora_kit.sweeps.sweep import sweep as run

    with _log_trials():
        report = run(
            recipe,
            over,
            overrides=parse_recipe_flags(flags),
            method=method,
            metric=metric,
            trials=trials,
            seed=seed,
            prune=prune,
            keep=keep,
            workers=workers,
            replace=replace,
        )
    if json:
        print_json(report.to_json())
        return
    print_table(("trial", report.metric, *report.best.params, "steps", "seconds", ""), _build_trial_rows(report))
    print_table(("", ""), [("best", f"trial {report.best.number}"), ("written", str(report.out)),
                           ("more", str(report.folder))])  # fmt: skip


@contextlib.contextmanager
def _log_trials() -> Iterator[None]:
    """Print a line for every trial that ends."""
    logger = logging.getLogger("lora_kit.sweeps")
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)


def _build_trial_rows(report: SweepReport) -> list[tuple[str, ...]]:
    """Return a row for each trial, the best ones first, those without a value last."""
    sign = -1 if report.direction == "maximize" else 1

    def order(trial: TrialReport) -> tuple[bool, float]:
        return trial.state != "complete", sign * (trial.value or 0)

    return [_build_trial_row(trial, report.best.params) for trial in sorted(report.trials, key=order)]


def _build_trial_row(trial: TrialReport, keys: Iterable[str]) -> tuple[str, ...]:
    numbers = (trial.value, *(trial.params[key] for key in keys))
    cells = [f"{cell:.5g}" if isinstance(cell, float) else "" if cell is None else str(cell) for cell in numbers]
    seconds = "" if trial.seconds is None else f"{trial.seconds:.1f}"
    state = "" if trial.state == "complete" else f"{trial.state}{': ' if trial.error else ''}{trial.error}"
    return (str(trial.number), *cells, str(trial.steps or ""), seconds, state)
