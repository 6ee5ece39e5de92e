"""`keep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_kit.cli.app import AsJson, Replace, app
from lora_kit.cli.next_steps import list_training_commands, print_next
from lora_kit.cli.output import print_json, print_table

if TYPE_CHECKING:
    from lora_kit.training.results import TrainReport


@app.command
def keep(
    run: Path, /, *, out: Path | None = None, step: int | None = None, replace: Replace = False, json: AsJson = False
) -> None:
    """Make a checkpoint of a training its result: the adapter with card, record, log and report.

    It is what the training would have saved if it had ended at its newest checkpoint: the best one so far, where the
    recipe keeps the best. The checkpoints stay. A training that is running has to be stopped first.

    Example: lora-kit keep adapters/mine

    Args:
        run: The folder of the checkpoints, <out>.run, or the recipe's out.
        out: The adapter folder to write; the recipe's out if it is not given.
        step: The step of the checkpoint; if it is not given, the newest one that is whole.
    """
    from lora_kit.training.keep import keep as run_keep

    report = run_keep(run, out=out, step=step, replace=replace)
    if json:
        print_json({"out": str(report.out), "step": report.kept, "steps": report.planned, "digest": report.digest})
        return
    print_table(("", ""), _build_facts(report))
    print_next(list_training_commands(report.recipe, of_pairs=report.text_pairs))


def _build_facts(report: TrainReport) -> list[tuple[str, str]]:
    best = ", the best" if report.kept != report.steps else ""
    facts = [
        ("written", str(report.out)),
        ("kept", f"step {report.kept:,} of {report.planned:,}{best}"),
        ("training loss", f"{report.train_loss:.4f}"),
    ]
    before, after = (evaluation.metrics() if evaluation else {} for evaluation in (report.before, report.after))
    facts += [(f"validation {key}", f"{before[key]:.4f} before, {value:.4f} after") for key, value in after.items()]
    return [*facts, ("digest", str(report.digest))]
