"""The metrics by name: which tasks and problems they fit, which package they need, and which direction is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import Final

from lora_kit.errors import ConfigError, format_list, suggest_nearest
from lora_kit.models.tasks import (
    CLASSIFY,
    GENERATIVE_TASKS,
    LABEL_TASKS,
    MULTI_LABEL,
    PROBLEMS,
    REGRESSION,
    SINGLE_LABEL,
    TASKS,
    TOKENS,
)


@dataclass(frozen=True)
class Metric:
    """A measure of how good a model is.

    Attributes:
        tasks: the tasks that it fits.
        greater_is_better: whether a greater value is better.
        package: the optional package that computes it; empty for none.
        problems: the problems of task `classify` that it fits, where it fits that task.
        is_one_value: whether it is one number; else it has one for each label, called `f1[label]`.
    """

    tasks: tuple[str, ...]
    greater_is_better: bool = True
    package: str = ""
    problems: tuple[str, ...] = PROBLEMS
    is_one_value: bool = True

    def fits(self, task: str, problem: str | None) -> bool:
        """Return whether it fits a task, and its problem where that is known."""
        return task in self.tasks and (task != CLASSIFY or problem is None or problem in self.problems)


_LABELED: Final = (SINGLE_LABEL, MULTI_LABEL)
F1_PER_LABEL: Final = "f1_per_label"

METRICS: Final[Mapping[str, Metric]] = MappingProxyType(
    {
        "loss": Metric(TASKS, greater_is_better=False),
        "perplexity": Metric(GENERATIVE_TASKS, greater_is_better=False),
        "accuracy": Metric(LABEL_TASKS, problems=_LABELED),
        "f1": Metric(LABEL_TASKS, problems=_LABELED),
        "f1_macro": Metric(LABEL_TASKS, problems=_LABELED),
        "f1_micro": Metric(LABEL_TASKS, problems=_LABELED),
        F1_PER_LABEL: Metric(LABEL_TASKS, problems=_LABELED, is_one_value=False),
        "auroc": Metric((CLASSIFY,), problems=_LABELED),
        "pearson": Metric((CLASSIFY,), problems=(REGRESSION,)),
        "spearman": Metric((CLASSIFY,), problems=(REGRESSION,)),
        "mae": Metric((CLASSIFY,), greater_is_better=False, problems=(REGRESSION,)),
        "exact_match": Metric((*GENERATIVE_TASKS, TOKENS)),
        "bleu": Metric(GENERATIVE_TASKS, package="sacrebleu"),
        "chrf": Metric(GENERATIVE_TASKS, package="sacrebleu"),
        "rouge": Metric(GENERATIVE_TASKS, package="torchmetrics"),
    }
)
"""Loss in nats per label, of a regression the mean squared error; BLEU and chrF from 0 to 100, as sacrebleu returns
them; correlations from -1 to 1; the mean absolute error in the unit of the labels; accuracy and all others 0 to 1."""

BASIC_METRICS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    dict.fromkeys(GENERATIVE_TASKS, ("loss", "perplexity")) | dict.fromkeys(LABEL_TASKS, ("loss", "accuracy"))
)
"""What every evaluation in training measures, by task, since it costs nothing more."""
_REGRESSION_METRICS: Final = ("loss", "mae")
"""The same for a regression."""


def basic_metrics(task: str, problem: str | None = None) -> tuple[str, ...]:
    """Return what every evaluation in training measures."""
    return _REGRESSION_METRICS if task == CLASSIFY and problem == REGRESSION else BASIC_METRICS[task]


def default_metrics(task: str, problem: str | None = None) -> tuple[str, ...]:
    """Return what an evaluation measures by default: what needs no generation."""
    if task == CLASSIFY and problem == REGRESSION:
        return (*_REGRESSION_METRICS, "pearson", "spearman")
    if task == CLASSIFY and problem == MULTI_LABEL:
        return (*BASIC_METRICS[task], "f1_micro", "f1_macro")
    return (*BASIC_METRICS[task], *(("f1",) if task in LABEL_TASKS else ()))


def metrics_for_task(task: str, problem: str | None = None) -> tuple[str, ...]:
    """Return the metrics that fit a task, and its problem where that is known."""
    return tuple(name for name, metric in METRICS.items() if metric.fits(task, problem))


def select_generation_metrics(names: Sequence[str], task: str) -> tuple[str, ...]:
    """Return those of some metrics that need generated texts."""
    return tuple(name for name in names if task in GENERATIVE_TASKS and name not in BASIC_METRICS[task])


def validate_metrics(names: Sequence[str], task: str, problem: str | None = None) -> tuple[str, ...]:
    """Return the requested metrics, each once.

    Args:
        problem: of task `classify`; None where it is not known yet.

    Raises:
        ConfigError: a metric is unknown, does not fit the task, or needs a package that is not installed.
    """
    for name in names:
        if name not in METRICS:
            hint = suggest_nearest(name, METRICS) or f"known: {format_list(list(METRICS), most=len(METRICS))}"
            raise ConfigError(f"metric {name!r} is not known", hint=hint)
        if not METRICS[name].fits(task, problem):
            what = f"task {task}" if task not in METRICS[name].tasks else f"problem {problem}"
            known = metrics_for_task(task, problem)
            raise ConfigError(
                f"metric {name!r} does not fit {what}",
                hint=f"known for {what.partition(' ')[2]}: {format_list(known, most=len(known))}",
            )
        package = METRICS[name].package
        if package and find_spec(package) is None:
            raise ConfigError(
                f"metric {name!r} needs {package}, which is not installed", hint="pip install 'lora-kit[eval]'"
            )
    return tuple(dict.fromkeys(names))
