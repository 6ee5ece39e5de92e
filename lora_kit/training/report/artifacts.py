"""What stands beside the trained weights: recipe, chat template, metrics line by line, a report, a picture."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lora_kit.names import RECIPE_FILE
from lora_kit.training.report.html import render_report_page
from lora_kit.training.report.samples import AnsweredSample
from lora_kit.training.results import TrainReport

logger = logging.getLogger(__name__)

METRICS_FILE: Final = "metrics.jsonl"
REPORT_FILE: Final = "report.html"
LOSS_CURVE_FILE: Final = "loss.png"
CHAT_TEMPLATE_FILE: Final = "chat_template.jinja"
"""The chat template that was trained with, where transformers and servers look for one."""


def build_result_files(report: TrainReport, *, samples: Sequence[AnsweredSample], labels: int) -> dict[str, bytes]:
    """The further files of a result, by name. Without matplotlib there is no picture, and that is logged.

    Args:
        samples: answers before and after.
        labels: how many there are, where the task has some.
    """
    recipe = report.recipe
    lines = "".join(json.dumps(entry) + "\n" for entry in report.history)
    files = {RECIPE_FILE: recipe.to_yaml().encode(), METRICS_FILE: lines.encode()}
    files[REPORT_FILE] = render_report_page(report, samples=samples, labels=labels).encode()
    if recipe.data.chat_template:
        files[CHAT_TEMPLATE_FILE] = recipe.data.chat_template.encode()
    picture = plot_loss_curve(report.history, title=recipe.name)
    return {**files, LOSS_CURVE_FILE: picture} if picture else files


def plot_loss_curve(history: Sequence[Mapping[str, Any]], *, title: str) -> bytes | None:
    """A PNG of the training and the validation loss over steps; None where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no %s: matplotlib is not installed (pip install 'lora-kit[plot]')", LOSS_CURVE_FILE)
        return None
    figure = Figure(figsize=(6, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats)", title=title)
    for key, label, marker in (("loss", "training", ""), ("eval_loss", "validation", "o")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, linewidth=1.4)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
