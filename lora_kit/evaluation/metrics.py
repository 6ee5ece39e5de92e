"""The metrics by name: which tasks they fit, which package they need, and which direction is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import Final

from lora_kit.errors import ConfigError, format_list, suggest_nearest
from lora_kit.models.tasks import GENERATIVE_TASKS, LABEL_TASKS, TASKS, TOKENS


@dataclass(frozen=True)
class Metric:
    """A measure of how good a model is.

    Attributes:
        tasks: the tasks that it fits.
        greater_is_better: whether a greater value is better.
        package: the optional package that computes it; empty for none.
    """

    tasks: tuple[str, ...]
    greater_is_better: bool = True
    package: str = ""


METRICS: Final[Mapping[str, Metric]] = MappingProxyType(
    {
        "loss": Metric(TASKS, greater_is_better=False),
        "perplexity": Metric(GENERATIVE_TASKS, greater_is_better=False),
        "accuracy": Metric(LABEL_TASKS),
        "f1": Metric(LABEL_TASKS),
        "f1_macro": Metric(LABEL_TASKS),
        "f1_micro": Metric(LABEL_TASKS),
        "exact_match": Metric((*GENERATIVE_TASKS, TOKENS)),
        "bleu": Metric(GENERATIVE_TASKS, package="sacrebleu"),
        "chrf": Metric(GENERATIVE_TASKS, package="sacrebleu"),
        "rouge": Metric(GENERATIVE_TASKS, package="torchmetrics"),
    }
)
"""Loss in nats per label; BLEU and chrF from 0 to 100, as sacrebleu returns them; accuracy and all others 0 to 1."""

BASIC_METRICS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    dict.fromkeys(GENERATIVE_TASKS, ("loss", "perplexity")) | dict.fromkeys(LABEL_TASKS, ("loss", "accuracy"))
)
"""What every evaluation in training measures, by task, since it costs nothing more."""


def metrics_for_task(task: str) -> tuple[str, ...]:
    """Return the metrics that fit a task."""
    return tuple(name for name, metric in METRICS.items() if task in metric.tasks)


def select_generation_metrics(names: Sequence[str], task: str) -> tuple[str, ...]:
    """Return those of some metrics that need generated texts."""
    return tuple(name for name in names if task in GENERATIVE_TASKS and name not in BASIC_METRICS[task])


def validate_metrics(names: Sequence[str], task: str) -> tuple[str, ...]:
    """Return the requested metrics, each once.

    Raises:
        ConfigError: a metric is unknown, does not fit the task, or needs a package that is not installed.
    """
    for name in names:
        if name not in METRICS:
            hint = suggest_nearest(name, METRICS) or f"known: {format_list(list(METRICS), most=len(METRICS))}"
            raise ConfigError(f"metric {name!r} is not known", hint=hint)
        if task not in METRICS[name].tasks:
            raise ConfigError(
                f"metric {name!r} does not fit task {task}",
                hint=f"known for {task}: {format_list(metrics_for_task(task))}",
            )
        package = METRICS[name].package
        if package and find_spec(package) is None:
            raise ConfigError(
                f"metric {name!r} needs {package}, which is not installed", hint="pip install 'lora-kit[eval]'"
            )
    return tuple(dict.fromkeys(names))
