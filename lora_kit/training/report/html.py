"""The report of a training as one self-contained page of HTML: no network, no script, all text escaped."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from html import escape
from importlib import metadata
from pathlib import Path

from lora_kit.adapter.model_card import write_bank_loading_code, write_base_loading_code, write_peft_loading_code
from lora_kit.models.tasks import GENERATIVE_TASKS
from lora_kit.training.report.plots import Curve, Mark, can_plot, plot_curves
from lora_kit.training.report.samples import AnsweredSample
from lora_kit.training.results import LogEntry, TrainReport

_CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Forbids a browser to fetch anything for this page, whatever its text is."""


def render_report_page(report: TrainReport, *, samples: Sequence[AnsweredSample] = (), num_labels: int = 0) -> str:
    """Return the report as HTML.

    Args:
        report: of the training; its history has the values of the curves.
        samples: validation samples with their answers.
        num_labels: of the task; 0 where it has none.
    """
    name, recipe = escape_html(report.recipe.name), report.recipe
    lead = escape_html(f"{recipe.task}, {recipe.method}, on {recipe.base}")
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    sections = [
        _render_facts(report),
        _render_events(report),
        _render_charts(report),
        _render_samples(samples),
        _render_loading(report, num_labels),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_CONTENT_SECURITY_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>\n{style}</style></head>\n<body><main>\n"
        f'<header><h1>{name}</h1><p class="lead">{lead}</p></header>\n'
        + "\n".join(part for part in [*sections, _render_recipe(report)] if part)
        + f"\n{_render_footer(report)}\n</main></body></html>\n"
    )


def escape_html(value: object) -> str:
    """Return a value as text of a page: escaped, control characters made visible, its writing direction isolated."""
    text = str(value).encode("utf-8", "backslashreplace").decode()
    visible = "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return escape(visible) if visible.isascii() else f"<bdi>{escape(visible)}</bdi>"


# Facts and events


def _render_facts(report: TrainReport) -> str:
    facts: list[tuple[str, str, str]] = []
    before, after = (evaluation.metrics() if evaluation else {} for evaluation in (report.before, report.after))
    for key, value in after.items():
        facts.append((f"validation {key}", f"{value:.4g}", f"{before[key]:.4g} before" if key in before else ""))
    facts.append(("training loss", f"{report.train_loss:.4g}", "nats per label, last interval"))
    share = report.trainable / report.parameters
    facts.append(("trained", f"{share:.2%}", f"{report.trainable:,} of {report.parameters:,} parameters"))
    kept = f"step {report.kept:,} kept, the best" if report.kept != report.steps else f"{report.tokens:,} tokens"
    facts.append(("steps", f"{report.steps:,}", kept))
    seconds = str(timedelta(seconds=round(report.seconds))) if report.seconds >= 60 else f"{report.seconds:.1f} s"
    facts.append(("time", seconds, f"{report.tokens_per_second:,.0f} tokens/s"))
    facts.append(("memory", _format_gigabytes(report.peak_bytes), "peak"))
    cells = (
        f"<div><dt>{escape_html(title)}</dt><dd>{escape_html(value)}<small>{escape_html(note)}</small></dd></div>"
        for title, value, note in facts
    )
    return f'<dl class="facts">{"".join(cells)}</dl>'


def _render_events(report: TrainReport) -> str:
    """Return a list of what interrupted or changed the training; empty where nothing did."""
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
    if report.kept != report.steps:
        events.append(f"The weights of step {report.kept:,} were kept: the best evaluation.")
    return f'<ul class="events">{"".join(f"<li>{escape_html(event)}</li>" for event in events)}</ul>' if events else ""


def _find_halvings(report: TrainReport) -> list[LogEntry]:
    """Return the entries of the log at which the micro-batch was halved."""
    return [entry for entry in report.history if "micro_batch" in entry]


# Curves


def _render_charts(report: TrainReport) -> str:
    if not can_plot():
        return (
            '<section><h2>Curves over steps</h2><p class="note">No curves: matplotlib is not installed '
            "(pip install 'lora-kit[plot]'). The values are in metrics.jsonl.</p></section>"
        )
    charts = []
    if loss := _collect_loss_curves(report):
        marks = [Mark(entry["step"], f"{entry['micro_batch']} rows at once") for entry in _find_halvings(report)]
        marks += [Mark(report.resumed, "resumed")] if report.resumed else []
        marks += [Mark(report.kept, "kept")] if report.kept != report.steps else []
        charts.append(plot_curves("loss, nats per label", loss, format_value=_format_number, marks=marks))
    charts += [
        plot_curves(title, [curve], format_value=format_value)
        for title, curve, format_value in _iterate_other_curves(report)
    ]
    return f'<section><h2>Curves over steps</h2><div class="charts">{"".join(charts)}</div></section>'


def _collect_loss_curves(report: TrainReport) -> list[Curve]:
    curves = [
        Curve("training", _collect_points(report, "loss")),
        Curve("validation", _collect_points(report, "eval_loss"), dots=True),
    ]
    return [curve for curve in curves if curve.points]


def _iterate_other_curves(report: TrainReport) -> Iterator[tuple[str, Curve, Callable[[float], str]]]:
    further = dict.fromkeys(key for entry in report.history for key in entry if key.startswith("eval_"))
    # Perplexity is the loss once more, on a scale on which only the first value can be seen.
    titles: dict[str, tuple[str, Callable[[float], str]]] = {
        key: (f"validation {key.removeprefix('eval_')}", _format_number)
        for key in further
        if key not in ("eval_loss", "eval_perplexity")
    }
    titles |= {
        "learning_rate": ("learning rate", _format_number),
        "grad_norm": ("gradient norm", _format_number),
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


def _format_number(value: float) -> str:
    return f"{value:.4g}"


def _format_gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


# Samples, loading, recipe


def _render_samples(samples: Sequence[AnsweredSample]) -> str:
    if not samples:
        return ""
    rows = "".join(
        "<tr>"
        + "".join(f"<td>{escape_html(text)}</td>" for text in (each.prompt, each.expected, each.before, each.after))
        + "</tr>" for each in samples
    )  # fmt: skip
    return (
        '<section><h2>Before and after</h2><p class="note">Validation samples; the greedy answer of the model '
        'before and after training.</p><div class="wide"><table><thead><tr><th>prompt</th><th>expected</th>'
        f"<th>before</th><th>after</th></tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _render_loading(report: TrainReport, num_labels: int) -> str:
    write = {"full": _write_model_loading, "peft": _write_peft_loading}.get(report.method, _write_adapter_loading)
    blocks = "".join(f"<pre><code>{escape_html(text)}</code></pre>" for text in write(report, num_labels))
    return f"<section><h2>How to load it</h2>{blocks}</section>"


def _write_adapter_loading(report: TrainReport, num_labels: int) -> tuple[str, ...]:
    recipe, out = report.recipe, str(report.out)
    loading = write_base_loading_code(recipe.base, task=recipe.task, labels=num_labels, problem=recipe.problem)
    python = (
        f"import lora_kit as lk\n\n{loading}\n"
        f"{write_bank_loading_code(recipe.name, out, model='base.model')}    # bank.use(None): the base again"
    )
    if num_labels:
        return python, f"lora-kit predict --adapter {shlex.quote(out)} --text '…'"
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


def _render_recipe(report: TrainReport) -> str:
    return f"<section><h2>Recipe</h2><pre><code>{escape_html(report.recipe.to_yaml())}</code></pre></section>"


def _render_footer(report: TrainReport) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("lora-kit", "torch", "transformers"))
    return f"<footer>{escape_html(versions)}</footer>"
