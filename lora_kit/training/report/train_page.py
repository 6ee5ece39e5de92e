"""The report of a training as a page: what it can do now, what changed, the mistakes, the curves, how it is used."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Final

from lora_kit.adapter.model_card import write_bank_loading_code, write_base_loading_code, write_peft_loading_code
from lora_kit.evaluation.outcome_sections import render_metrics, render_outcomes, write_metric_title
from lora_kit.evaluation.outcomes import Outcomes
from lora_kit.models.tasks import GENERATIVE_TASKS, REGRESSION
from lora_kit.reporting.page import (
    NO_PLOTS,
    Fact,
    format_figure,
    render_charts,
    render_code,
    render_events,
    render_facts,
    render_page,
    render_section,
    render_table,
)
from lora_kit.reporting.plots import Curve, Mark, can_plot, plot_curves
from lora_kit.runs.run_files import LogEntry
from lora_kit.training.recipe.training_arguments import is_greater_better
from lora_kit.training.results import TrainReport

_ANSWER_TITLES: Final = {"reward": "reward", "completions/mean_length": "tokens of an answer", "kl": "divergence"}
"""What is measured of the answers that the model writes during the training, by its key in the log."""


def render_train_page(report: TrainReport, *, outcomes: Outcomes | None = None, num_labels: int = 0) -> str:
    """Return the report as HTML.

    Args:
        report: of the training; its history has the values of the curves.
        outcomes: validation rows with the answers before and after; None without any.
        num_labels: of the task; 0 where it has none.
    """
    recipe = report.recipe
    before, after = (evaluation.metrics() if evaluation else {} for evaluation in (report.before, report.after))
    return render_page(
        recipe.name,
        f"{recipe.task}, {recipe.method}, on {recipe.base}",
        [
            _render_cards(report),
            render_events(describe_events(report)),
            *(render_outcomes(outcomes) if outcomes is not None else ()),
            render_section("Figures before and after", render_metrics(before, after, ("before", "after"))),
            _render_curves(report),
            render_section("How to load it", render_code(*_write_loading(report, num_labels))),
            _render_record(report),
            render_section("Recipe", render_code(recipe.to_yaml())),
        ],
        summary=_summarize(report),
    )


# Facts and events


def _summarize(report: TrainReport) -> str:
    """Return what the training brought in a sentence: the most telling metric before and after."""
    if report.after is None:
        return "Nothing was measured: the recipe names no validation rows."
    before, after = (evaluation.metrics() if evaluation else {} for evaluation in (report.before, report.after))
    name = next((name for name in ("accuracy", "mae", "reward", "perplexity", "loss") if name in after), "loss")
    was = f"{format_figure(before[name])} before, " if name in before else ""
    way = "higher" if is_greater_better(name) else "lower"
    rows = f"{report.after.samples:,} validation samples" if report.after.samples else "the validation samples"
    return f"{write_metric_title(name)} on {rows}: {was}{format_figure(after[name])} after training ({way} is better)."


def _render_cards(report: TrainReport) -> str:
    facts: list[Fact] = []
    before, after = (evaluation.metrics() if evaluation else {} for evaluation in (report.before, report.after))
    for key, value in after.items():
        was = f"{format_figure(before[key])} before" if key in before else ""
        facts.append(Fact(f"validation {key}", format_figure(value), was))
    facts.append(Fact("training loss", format_figure(report.train_loss), f"{_name_loss_unit(report)}, last interval"))
    share = report.trainable / report.parameters
    facts.append(Fact("trained", f"{share:.2%}", f"{report.trainable:,} of {report.parameters:,} parameters"))
    kept = f"step {report.kept:,} kept, the best" if report.kept != report.steps else f"{report.tokens:,} tokens"
    facts.append(Fact("steps", f"{report.steps:,}", kept))
    seconds = str(timedelta(seconds=round(report.seconds))) if report.seconds >= 60 else f"{report.seconds:.1f} s"
    facts.append(Fact("time", seconds, f"{report.tokens_per_second:,.0f} tokens/s"))
    facts.append(Fact("memory", _format_gigabytes(report.peak_bytes), "peak"))
    return render_facts(facts)


def _name_loss_unit(report: TrainReport) -> str:
    return "squared error" if report.recipe.problem == REGRESSION else "nats per label"


def describe_events(report: TrainReport) -> list[str]:
    """Return what interrupted, changed or ended the training, a sentence each; empty where nothing did."""
    events = []
    if report.resumed:
        events.append(f"Stopped, and resumed from the checkpoint of step {report.resumed:,}.")
    for entry in _find_halvings(report):
        events.append(
            f"Memory ran out in step {entry['step']:,}: since then {entry['micro_batch']} rows at once and "
            f"accumulation {entry['accumulation']}; a step has as many rows as before."
        )
    if report.planned is not None:
        events.append(f"Kept from a checkpoint, at step {report.steps:,} of {report.planned:,}.")
    kept = f"step {report.kept:,} was kept" + _describe_best(report)
    if report.is_stopped_early:
        events.append(f"Stopped early at step {report.steps:,} of {report.max_steps:,}; {kept}.")
    elif report.kept != report.steps:
        events.append(f"Trained to step {report.steps:,}; {kept}.")
    return events


def _describe_best(report: TrainReport) -> str:
    """Return why a step was kept: it has the best value of a metric."""
    metric = str(report.recipe.train.get("metric_for_best_model") or "loss").removeprefix("eval_")
    values = {entry["step"]: entry.get(f"eval_{metric}") for entry in report.history if f"eval_{metric}" in entry}
    best, last = values.get(report.kept), values.get(report.steps)
    if best is None:
        return ", the best evaluation"
    then = f" ({format_figure(last)} at the end)" if last is not None and report.kept != report.steps else ""
    return f", with the best validation {metric}: {format_figure(best)}{then}"


def _find_halvings(report: TrainReport) -> list[LogEntry]:
    """Return the entries of the log at which the micro-batch was halved."""
    return [entry for entry in report.history if "micro_batch" in entry]


# Curves


def _render_curves(report: TrainReport) -> str:
    title = "Curves over steps"
    if not can_plot():
        return render_section(title, f'<p class="note">{NO_PLOTS} The values are in metrics.jsonl.</p>')
    charts = []
    if loss := _collect_loss_curves(report):
        marks = [Mark(entry["step"], f"{entry['micro_batch']} rows at once") for entry in _find_halvings(report)]
        marks += [Mark(report.resumed, "resumed")] if report.resumed else []
        marks += [Mark(report.kept, "kept")] if report.kept != report.steps else []
        marks += [Mark(report.steps, "stopped early")] if report.is_stopped_early else []
        charts.append(plot_curves(f"loss, {_name_loss_unit(report)}", loss, format_value=format_figure, marks=marks))
    charts += [
        plot_curves(title, [curve], format_value=format_value)
        for title, curve, format_value in _iterate_other_curves(report)
    ]
    return render_section(title, render_charts(charts))


def _collect_loss_curves(report: TrainReport) -> list[Curve]:
    curves = [
        Curve("training", _collect_points(report, "loss")),
        Curve("validation", _collect_points(report, "eval_loss"), dots=True),
    ]
    return [curve for curve in curves if curve.points]


def _iterate_other_curves(report: TrainReport) -> Iterator[tuple[str, Curve, Callable[[float], str]]]:
    keys = dict.fromkeys(key for entry in report.history for key in entry)
    further = dict.fromkeys(key for key in keys if key.startswith("eval_"))
    # Perplexity is the loss once more, on a scale on which only the first value can be seen.
    titles: dict[str, tuple[str, Callable[[float], str]]] = {
        key: (f"validation {key.removeprefix('eval_')}", format_figure)
        for key in further
        if key not in ("eval_loss", "eval_perplexity")
    }
    own = {key: key.removesuffix("/mean") for key in keys if key.startswith("rewards/") and key.endswith("/mean")}
    titles |= {key: (f"training {name}", format_figure) for key, name in {**_ANSWER_TITLES, **own}.items()}
    titles |= {
        "learning_rate": ("learning rate", format_figure),
        "grad_norm": ("gradient norm", format_figure),
        "tokens_per_second": ("tokens per second", lambda value: f"{value:,.0f}"),
        "peak_bytes": ("peak memory so far", _format_gigabytes),
    }
    for key, (title, format_value) in titles.items():
        if points := _collect_points(report, key):
            yield title, Curve("", points, dots=key in further), format_value


def _collect_points(report: TrainReport, key: str) -> list[tuple[float, float]]:
    """Return (step, value) for each entry of the log that has both; the last entry is a sum and no point."""
    values = [(entry["step"], entry[key]) for entry in report.history if key in entry and "train_loss" not in entry]
    return [(step, value) for step, value in values if isinstance(value, (int, float)) and math.isfinite(value)]


def _format_gigabytes(value: float) -> str:
    return f"{value / 1e9:,.{2 if value >= 1e9 else 3}f} GB"


# Loading, record


def _write_loading(report: TrainReport, num_labels: int) -> tuple[str, ...]:
    write = {"full": _write_model_loading, "peft": _write_peft_loading}.get(report.method, _write_adapter_loading)
    return write(report, num_labels)


def _write_adapter_loading(report: TrainReport, num_labels: int) -> tuple[str, ...]:
    recipe, out = report.recipe, str(report.out)
    loading = write_base_loading_code(recipe.base, task=recipe.task, labels=num_labels, problem=recipe.problem)
    python = (
        f"import lora_kit as lk\n\n{loading}\n"
        f"{write_bank_loading_code(recipe.name, out, model='base.model')}    # bank.use(None): the base again"
    )
    if num_labels:
        second = " --text-pair 'another text'" if report.text_pairs else ""
        return python, f"lora-kit predict --adapter {shlex.quote(out)} 'a text'{second}"
    return python, f"lora-kit generate --base {shlex.quote(recipe.base)} --adapter {shlex.quote(out)} --prompt '…'"


def _write_peft_loading(report: TrainReport, num_labels: int) -> tuple[str, ...]:
    recipe = report.recipe
    code = write_peft_loading_code(
        recipe.base, str(report.out), task=recipe.task, labels=num_labels, problem=recipe.problem
    )
    return (code,)


def _write_model_loading(report: TrainReport, num_labels: int) -> tuple[str, ...]:
    recipe, out = report.recipe, str(report.out)
    python = (
        f"import lora_kit as lk\n\n{write_base_loading_code(out, task=recipe.task)}    # base.model, base.tokenizer"
    )
    verb = "generate --prompt '…'" if recipe.task in GENERATIVE_TASKS else "eval --data rows.jsonl"
    return python, f"lora-kit {verb} --base {shlex.quote(out)}"


def _render_record(report: TrainReport) -> str:
    recipe = report.recipe
    facts = [("base", recipe.base), ("seed", str(recipe.seed)), ("steps", f"{report.steps:,}")]
    facts += [("rows at once", f"{report.micro_batch:,}"), ("tokens", f"{report.tokens:,}")]
    facts += [("processes", f"{report.processes}")] if report.processes > 1 else []
    if report.thresholds:
        facts.append(("thresholds", ", ".join(format_figure(value) for value in report.thresholds)))
    note = "Digests of the files, of the adapter and of its base are in lora_kit.json beside this page."
    return render_section(
        "Record", render_table(("what", "value"), facts), note=note if report.method != "full" else ""
    )
