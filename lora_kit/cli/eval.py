"""`eval`."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lora_kit.cli.app import Adapters, Allow, AsJson, Replace, Store, app
from lora_kit.cli.next_steps import build_command, build_flags, build_loading_flags, build_using_command, print_next
from lora_kit.cli.output import print_json, print_table, print_text
from lora_kit.cli.process import show_progress_lines
from lora_kit.errors import ConfigError
from lora_kit.io.text import escape_for_terminal
from lora_kit.names import DEFAULT_STORE

if TYPE_CHECKING:
    from lora_kit.evaluation.eval_report import EvalReport
    from lora_kit.evaluation.evaluate import EvalProgress


@app.command(name="eval")
def evaluate(
    data: Path,
    *,
    adapter: Adapters | None = None,
    base: str | None = None,
    quantize: str | None = None,
    compare: Annotated[bool, Parameter(negative="")] = False,
    metrics: Annotated[list[str] | None, Parameter(negative="", consume_multiple=True)] = None,
    batch_size: int = 16,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    out: Path | None = None,
    report: Path | None = None,
    replace: Replace = False,
    allow: Allow = None,
    store: Store = DEFAULT_STORE,
    json: AsJson = False,
) -> None:
    """Measure adapters on the rows of a file, side by side.

    Each adapter gets the rows in the format of its training. Rows with the same prompt are references of one another.

    Example: lora-kit eval valid.jsonl --adapter mine --compare

    Args:
        data: File of rows, in any format that prepare reads.
        base: Base model: hub id, local folder or kit-base; by default the one that the adapters name, where it is here.
        quantize: Load it in nf4, nf4-double, fp4, fp4-double or int8.
        compare: Measure the base alone as well.
        metrics: Any of loss, perplexity, accuracy, f1, f1_macro, f1_micro, f1_per_label, auroc, pearson, spearman, mae,
            exact_match, bleu, chrf and rouge, with commas between them.
        batch_size: Rows at once.
        max_length: Tokens of a sample, at most; by default as in the training of each adapter.
        max_new_tokens: Tokens of an answer, at most; by default as many as the longest reference has.
        out: File for the answers to each row, as JSONL.
        report: File for a page with figures, mistakes and plots, .html.
    """
    from lora_kit.evaluation.evaluate import evaluate as run
    from lora_kit.models.infer_base import infer_base

    rows: list[str | None] = [*([None] if compare or not adapter else []), *(adapter or [])]
    with show_progress_lines(), show_row_progress() as on_progress:
        measured = run(
            base or infer_base(adapter or [], store=store),
            rows,
            data,
            metrics=_split_names(metrics),
            batch_size=batch_size,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            out=out,
            report=report,
            replace=replace,
            store=store,
            allow=allow or (),
            quantize=quantize,
            on_progress=on_progress,
        )
    commands = _list_next_commands(measured, adapter or [], build_loading_flags(base, allow, store), quantize)
    print_json(measured.to_json()) if json else _show_eval_report(measured, out, report, commands)


def _list_next_commands(
    report: EvalReport, adapters: Sequence[str], flags: Sequence[str], quantize: str | None
) -> Iterator[str]:
    """Yield the commands that ask the adapters what they were measured on, and that merge the only one."""
    from lora_kit.models.tasks import LABEL_TASKS

    loading = [*build_flags("adapter", adapters), *flags, *build_flags("quantize", quantize)]
    if len(adapters) > 1 and report.task not in LABEL_TASKS:
        loading.append("--compare")
    if loading:
        yield build_using_command(report.task, *loading, of_pairs=report.text_pairs)
    if len(adapters) == 1:
        [name] = adapters
        yield build_command("merge", "--adapter", name, *flags, "--out", Path("merged", Path(name).name))


def _split_names(items: Sequence[str] | None) -> list[str] | None:
    """Return `["bleu", "rouge", "chrf"]` for `["bleu,rouge", "chrf"]`."""
    if items is None:
        return None
    names = [name.strip() for item in items for name in item.split(",") if name.strip()]
    if not names:
        raise ConfigError("--metrics was given without a name", hint="--metrics loss,exact_match")
    return names


@contextlib.contextmanager
def show_row_progress() -> Iterator[EvalProgress]:
    """Show a bar for each adapter on stderr, where that is a terminal; yield what updates them."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:

        def on_progress(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bar.add_task(escape_for_terminal(label), total=total)
            bar.update(tasks[label], completed=done)

        yield on_progress


def _collect(report: EvalReport, name: str) -> list[float]:
    return [each.metrics[name] for each in report.results]


def _show_eval_report(report: EvalReport, out: Path | None, page: Path | None, commands: Iterator[str]) -> None:
    from lora_kit.evaluation.eval_report import collect_metric_names

    names = collect_metric_names(report.results)
    print_table(
        ("", *names), [(each.name, *(f"{each.metrics[name]:.4f}" for name in names)) for each in report.results]
    )
    asked = f", {len(report.cases):,} prompts" if report.cases and len(report.cases) != report.rows else ""
    print_text(f"\n{report.rows:,} rows{asked} of {report.data}, {report.seconds:.1f} s")
    absent = [name for name in names if name.startswith("f1[") and all(map(math.isnan, _collect(report, name)))]
    if absent:
        count = f"{len(absent):,} labels are" if len(absent) > 1 else "1 label is"
        print_text(f"{count} neither in this file nor predicted, and so without F1; the mean has the others")
    for each in report.results:
        if each.unended:
            cut = f"note: {each.unended:,} of {len(each.said):,} texts of {each.name} were cut off"
            print(escape_for_terminal(f"{cut}; raise --max-new-tokens"), file=sys.stderr)
    if out is not None:
        print_text(f"written: {out}")
    print_next(commands)
    if page is not None:
        print_text(f"\nreport: {page}")
