"""The report of an evaluation as a page: the figures of all models, and their answers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from lora_kit.errors import ConfigError
from lora_kit.evaluation.eval_report import EvalReport, collect_metric_names
from lora_kit.evaluation.metrics import F1_PER_LABEL, METRICS
from lora_kit.evaluation.outcome_sections import render_outcomes, write_metric_title
from lora_kit.evaluation.outcomes import ModelAnswers, Outcomes
from lora_kit.generation.adapter_args import BASE_ROW
from lora_kit.io.atomic_write import write_files
from lora_kit.io.output_file import check_output_file
from lora_kit.io.text import escape_text
from lora_kit.reporting.page import (
    NO_PLOTS,
    Markup,
    escape_html,
    format_figure,
    render_events,
    render_page,
    render_section,
    render_table,
)
from lora_kit.reporting.plots import can_plot

PAGE_SUFFIX: Final = ".html"


def check_page_file(path: Path, *, replace: bool, inputs: Iterable[str | Path] = ()) -> None:
    """Check that a page can be written, before any work.

    Args:
        inputs: files and folders that are read, which are never replaced or written into.

    Raises:
        ConfigError: its name ends otherwise.
        StorageError: it exists, it is an input, or its folder does not exist.
    """
    if path.suffix.lower() != PAGE_SUFFIX:
        raise ConfigError(f"{escape_text(path)}: a report is a page of HTML", hint="name it .html")
    check_output_file(path, replace=replace, inputs=inputs)


def save_eval_files(
    measured: EvalReport, out: str | Path | None, report: str | Path | None, *, base: str, replace: bool
) -> None:
    """Write the answers and the page of an evaluation, both or none.

    Args:
        out, report: the files; None for none.
        base: the name of the base.

    Raises:
        StorageError: a file exists, or cannot be written.
    """
    files = {}
    if report is not None:
        files[Path(report)] = render_eval_page(measured, base=base).encode()
    if out is not None:
        files[Path(out)] = measured.to_jsonl()
    for path in files:
        check_output_file(path, replace=replace)  # another process may have written it meanwhile
    write_files(files)


def render_eval_page(report: EvalReport, *, base: str) -> str:
    """Return the page of an evaluation.

    Args:
        base: the name of the base.
    """
    names = ", ".join(result.name for result in report.results)
    events = [
        f"{result.unended:,} of {len(result.said):,} texts of {result.name} were cut off before they ended."
        for result in report.results
        if result.unended
    ]
    asked = any(result.said for result in report.results)
    if not asked:
        events.append("No answers were asked for: --metrics exact_match, or another metric of texts, shows them.")
    return render_page(
        report.data.name,
        f"{names}, measured on {base}, {report.task}",
        [
            render_events([*events, *([] if can_plot() else [NO_PLOTS])]),
            _render_figures(report),
            *(render_outcomes(_collect_outcomes(report)) if asked else ()),
            _render_record(report, base),
        ],
        summary=summarize(report),
    )


def summarize(report: EvalReport) -> str:
    """Return the result in a sentence: the best model by the most telling metric."""
    metrics = [name for name in collect_metric_names(report.results) if name in METRICS]
    metric = next((name for name in metrics if name not in ("loss", "perplexity")), metrics[0] if metrics else None)
    if metric is None:
        return ""
    ordered = sorted(report.results, key=lambda each: each.metrics[metric], reverse=METRICS[metric].greater_is_better)
    best, *others = ordered
    rest = ", ".join(f"{each.name} {format_figure(each.metrics[metric])}" for each in others)
    said = f"{write_metric_title(metric)} on {report.rows:,} rows: {best.name} {format_figure(best.metrics[metric])}"
    return f"{said}; {rest}." if rest else f"{said}."


def _render_figures(report: EvalReport) -> str:
    """Return a table with a row for each model; the best value of a metric is marked."""
    names = [name for name in collect_metric_names(report.results) if name in METRICS and name != F1_PER_LABEL]
    best = {
        name: (max if METRICS[name].greater_is_better else min)(each.metrics[name] for each in report.results)
        for name in names
    }
    telling = {name for name in names if len({each.metrics[name] for each in report.results}) > 1}
    rows = []
    for each in report.results:
        cells: list[str] = [each.name]
        for name in names:
            text = format_figure(each.metrics[name])
            is_best = name in telling and each.metrics[name] == best[name]
            cells.append(Markup(f'<b class="right">{escape_html(text)}</b>') if is_best else text)
        rows.append(cells)
    return render_section("Figures", render_table(("model", *names), rows, numbers=True))


def _collect_outcomes(report: EvalReport) -> Outcomes:
    models = [ModelAnswers(each.name, each.said, each.misses) for each in report.results]
    order = sorted(models, key=lambda model: model.name != BASE_ROW)  # the base first, the last adapter is the subject
    has_base = any(model.name == BASE_ROW for model in models)
    return Outcomes(
        kind=report.kind,
        cases=report.cases,
        models=order,
        labels=report.labels,
        reference=BASE_ROW if has_base else None,
        total=len(report.cases),
    )


def _render_record(report: EvalReport, base: str) -> str:
    facts = [("rows", f"{report.rows:,} of {report.data.name}"), ("base", base), ("task", report.task)]
    facts += [(f"digest of {each.name}", each.digest) for each in report.results if each.digest]
    facts.append(("time", f"{report.seconds:.1f} s, without loading the base"))
    return render_section("Record", render_table(("what", "value"), facts))
