"""The report of a sweep as a page: what was tried, what was best, and what each key does to the metric."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_kit.reporting.page import (
    NO_PLOTS,
    Fact,
    format_figure,
    render_charts,
    render_events,
    render_facts,
    render_page,
    render_section,
    render_table,
)
from lora_kit.reporting.plots import Curve, can_plot, plot_points
from lora_kit.sweeps.sweep_plan import SweepPlan

if TYPE_CHECKING:
    from lora_kit.sweeps.sweep_report import TrialReport


def render_sweep_page(plan: SweepPlan, trials: Sequence[TrialReport], best: TrialReport) -> str:
    """Return the page of a sweep.

    Args:
        plan: of the sweep.
        trials: in the order in which they began.
        best: the one that was kept.
    """
    keys = list(plan.space)
    counts = {state: sum(trial.state == state for trial in trials) for state in ("complete", "pruned", "failed")}
    chosen = ", ".join(f"{key} {_show(best.params[key])}" for key in keys)
    assert best.value is not None
    failed = [f"Trial {trial.number} failed: {trial.error}" for trial in trials if trial.error]
    return render_page(
        Path(plan.out).name,
        f"sweep over {', '.join(keys)}",
        [
            render_facts(_list_facts(plan, trials, best, counts)),
            render_events([*failed, *([] if can_plot() else [NO_PLOTS])]),
            render_section("Trials", _render_trials(plan, trials, best), note="The best first."),
            render_section("What each key does", render_charts(list(_plot_keys(plan, trials)))),
        ],
        summary=f"Best {plan.metric} {format_figure(best.value)}, with {chosen}: trial {best.number} of {len(trials)}.",
    )


def _list_facts(
    plan: SweepPlan, trials: Sequence[TrialReport], best: TrialReport, counts: dict[str, int]
) -> Iterator[Fact]:
    values = sorted(trial.value for trial in trials if trial.value is not None and trial.state == "complete")
    assert best.value is not None
    yield Fact(f"best {plan.metric}", format_figure(best.value), f"{plan.direction}d")
    if values:
        yield Fact("from … to", f"{format_figure(values[0])} … {format_figure(values[-1])}", "complete trials")
    yield Fact("trials", f"{len(trials):,}", ", ".join(f"{count} {name}" for name, count in counts.items() if count))
    seconds = sum(trial.seconds or 0 for trial in trials)
    yield Fact("time", f"{seconds:,.0f} s", "of training, all trials")
    yield Fact("method", plan.method, f"seed {plan.seed}")


def _render_trials(plan: SweepPlan, trials: Sequence[TrialReport], best: TrialReport) -> str:
    sign = -1 if plan.direction == "maximize" else 1
    ordered = sorted(trials, key=lambda each: (each.state != "complete", sign * (each.value or 0), each.number))
    rows = [
        (
            str(each.number),
            *(_show(each.params[key]) for key in plan.space),
            "–" if each.value is None else format_figure(each.value),
            "–" if each.steps is None else f"{each.steps:,}",
            "–" if each.seconds is None else f"{each.seconds:.1f} s",
            each.state,
        )
        for each in ordered
    ]
    marked = next((index for index, each in enumerate(ordered) if each.number == best.number), None)
    header = ("trial", *plan.space, plan.metric, "steps", "time", "state")
    return render_table(header, rows, numbers=True, marked=marked)


def _plot_keys(plan: SweepPlan, trials: Sequence[TrialReport]) -> Iterator[str]:
    """Yield a plot of the metric over each key whose values are numbers."""
    if not can_plot():
        return
    measured = [(trial, trial.value) for trial in trials if trial.value is not None]
    for key, distribution in plan.space.items():
        clouds = []
        for state in ("complete", "pruned"):
            points = [(trial.params[key], value) for trial, value in measured if trial.state == state]
            numeric = [(float(x), y) for x, y in points if isinstance(x, (int, float)) and not isinstance(x, bool)]
            if numeric:
                clouds.append(Curve(state, numeric))
        if clouds:
            is_log = bool(getattr(distribution, "log", False))
            yield plot_points(f"{plan.metric} over {key}", clouds, names=(key, plan.metric), is_log=is_log)


def _show(value: object) -> str:
    return format_figure(value) if isinstance(value, float) else str(value)
