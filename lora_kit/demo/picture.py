"""The demo as a picture: the three loss curves, and the scores of base and adapters."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_kit.demo.demo_results import Trained

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

_WIDTH = 0.38


def draw(trained: Mapping[str, Trained], file: Path) -> Path | None:
    """Write a PNG; without matplotlib there is none, and that is logged."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no %s: matplotlib is not installed (pip install 'lora-kit[plot]')", file.name)
        return None
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _losses(left, trained)
    _scores(right, trained)
    figure.savefig(file, format="png", metadata={"Software": None})
    return file


def _losses(axes: Axes, trained: Mapping[str, Trained]) -> None:
    for name, found in trained.items():
        points = [(entry["step"], entry["loss"]) for entry in found.report.history if "loss" in entry]
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.6)
    axes.set(xlabel="step", ylabel="loss on completions (nats)", title="training three adapters", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _scores(axes: Axes, trained: Mapping[str, Trained]) -> None:
    places = range(len(trained))
    for label, shift, color in (("base", -_WIDTH / 2, "0.7"), ("adapter", _WIDTH / 2, "tab:green")):
        values = [100 * (found.base_score if label == "base" else found.score) for found in trained.values()]
        bars = axes.bar([place + shift for place in places], values, _WIDTH, label=label, color=color)
        axes.bar_label(bars, fmt="%.0f %%", padding=2)
    for place, found in zip(places, trained.values(), strict=True):
        if found.task.chance:
            ends = [place - _WIDTH, place + _WIDTH]
            axes.plot(ends, [100 * found.task.chance] * 2, color="black", linestyle=":", label="guessing")
    axes.set(ylim=(0, 125), ylabel="held-out rows right (%)", title="base against adapter")
    axes.set_xticks(list(places), labels=list(trained))
    axes.set_yticks(range(0, 101, 20))
    axes.legend(frameon=False, loc="upper center", ncols=3)
