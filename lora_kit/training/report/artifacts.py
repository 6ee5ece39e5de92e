"""The files beside the trained weights: recipe, chat template, metrics, report and a picture of the loss."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from lora_kit.evaluation.outcomes import Outcomes
from lora_kit.names import CHAT_TEMPLATE_FILE, METRICS_FILE, RECIPE_FILE
from lora_kit.runs.run_files import LogEntry
from lora_kit.training.job.output import (
    LOSS_CURVE_FILE,
    REPORT_FILE,
)
from lora_kit.training.recipe.portable_recipe import make_recipe_portable
from lora_kit.training.report.train_page import render_train_page
from lora_kit.training.results import TrainReport

logger = logging.getLogger(__name__)


def build_result_files(report: TrainReport, *, outcomes: Outcomes | None, num_labels: int) -> dict[str, bytes]:
    """Return the contents of the files beside the trained weights, by name.

    Without matplotlib the picture is left out, with a warning.

    Args:
        outcomes: validation rows with the answers before and after; None without any.
        num_labels: of the task; 0 where it has none.
    """
    recipe = make_recipe_portable(report.recipe)
    report = dataclasses.replace(report, recipe=recipe, out=Path(recipe.out))
    log = "".join(json.dumps(entry) + "\n" for entry in report.history)
    files = {
        RECIPE_FILE: recipe.to_yaml().encode(),
        METRICS_FILE: log.encode(),
        REPORT_FILE: render_train_page(report, outcomes=outcomes, num_labels=num_labels).encode(),
    }
    if recipe.data.chat_template:
        files[CHAT_TEMPLATE_FILE] = recipe.data.chat_template.encode()
    picture = plot_loss_curve(report.history, title=recipe.name)
    return {**files, LOSS_CURVE_FILE: picture} if picture else files


def plot_loss_curve(history: Sequence[LogEntry], *, title: str) -> bytes | None:
    """Return a PNG of the training and the validation loss over steps; None where matplotlib is not installed."""
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
