"""`sweep`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lora_kit.cli.app import AsJson, Replace, app
from lora_kit.cli.next_steps import list_training_commands, print_next
from lora_kit.cli.output import print_json, print_table, print_text
from lora_kit.cli.recipe_flags import check_recipe_keys, parse_recipe_flags
from lora_kit.models.silence import use_log_level
from lora_kit.names import RECIPE_FILE

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
    together: int = 1,
    replace: Replace = False,
    json: AsJson = False,
) -> None:
    """Train with many values of some keys; keep the best.

    A sweep that was stopped continues when the same command is given again; given twice at once, the two share the
    trials. Any key of the recipe is a flag here too, for all trials.

    Example: lora-kit sweep recipe.yaml --over lora.r=4,8,16

    Args:
        recipe: The recipe's file.
        method: grid, random or tpe (Bayesian); by default grid where every key has a list, else tpe.
        metric: Of the validation rows, by which trials are compared: loss, perplexity, accuracy, f1, bleu, ...
        trials: How many; by default all of a grid, else 20.
        seed: Decides what is tried; by default the recipe's.
        prune: median: stop a trial that is worse at an evaluation than half of the others were at that step.
        keep: best, or all: the results of all trials stay in the sweep's folder.
        workers: Processes that share the trials.
        together: Trials that a process trains at once over one base, each as if alone; for keys of lora and train.
    """
    overrides = parse_recipe_flags(flags)
    check_recipe_keys(overrides, [recipe])
    check_recipe_keys([each.partition("=")[0].strip() for each in over], [recipe], flag="--over ")
    from lora_kit.sweeps.sweep import sweep as run_sweep

    with use_log_level("lora_kit.sweeps", logging.INFO):  # a line for every trial that ends
        report = run_sweep(
            recipe,
            over,
            overrides=overrides,
            method=method,
            metric=metric,
            trials=trials,
            seed=seed,
            prune=prune,
            keep=keep,
            workers=workers,
            together=together,
            replace=replace,
        )
    print_json(report.to_json()) if json else _show_report(report)


def _show_report(report: SweepReport) -> None:
    from lora_kit.adapter.adapter_record import read_record
    from lora_kit.training.recipe.load import load_recipe

    print_table(("trial", report.metric, *report.best.params, "steps", "seconds", ""), _build_trial_rows(report))
    print_table(("", ""), [("best", f"trial {report.best.number}"), ("written", str(report.out)),
                           ("more", str(report.folder))])  # fmt: skip
    record = read_record(report.out, allow=()) or {}
    print_next(list_training_commands(load_recipe(report.out / RECIPE_FILE), of_pairs=record.get("text_pairs")))
    print_text(f"\nreport: {report.page}")


def _build_trial_rows(report: SweepReport) -> list[tuple[str, ...]]:
    """Return a row for each trial, the best ones first, those that are not complete last."""
    sign = -1 if report.direction == "maximize" else 1

    def order(trial: TrialReport) -> tuple[bool, float]:
        return trial.state != "complete", sign * (trial.value or 0)

    return [_build_trial_row(trial) for trial in sorted(report.trials, key=order)]


def _build_trial_row(trial: TrialReport) -> tuple[str, ...]:
    values = (trial.value, *trial.params.values())
    cells = [f"{value:.5g}" if isinstance(value, float) else "" if value is None else str(value) for value in values]
    seconds = "" if trial.seconds is None else f"{trial.seconds:.1f}"
    state = ": ".join(filter(None, ("" if trial.state == "complete" else trial.state, trial.error)))
    return (str(trial.number), *cells, str(trial.steps or ""), seconds, state)
