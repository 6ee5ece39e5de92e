"""What can be measured: the metrics by name, the tasks they fit, what they need, and which way is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import Final

from lora_kit.errors import ConfigError, listed, nearest

_WRITING: Final = ("causal-lm", "seq2seq")
_LABELLING: Final = ("classify", "tokens")


@dataclass(frozen=True)
class Metric:
    """A number that tells how good a model is.

    Attributes:
        tasks: those it fits.
        greater_is_better: which way is better.
        package: what it is taken by, if that has to be installed.
    """

    tasks: tuple[str, ...]
    greater_is_better: bool = True
    package: str = ""


METRICS: Final[Mapping[str, Metric]] = MappingProxyType(
    {
        "loss": Metric(_WRITING + _LABELLING, greater_is_better=False),
        "perplexity": Metric(_WRITING, greater_is_better=False),
        "accuracy": Metric(_LABELLING),
        "f1": Metric(_LABELLING),
        "f1_macro": Metric(_LABELLING),
        "f1_micro": Metric(_LABELLING),
        "exact_match": Metric((*_WRITING, "tokens")),
        "bleu": Metric(_WRITING, package="sacrebleu"),
        "chrf": Metric(_WRITING, package="sacrebleu"),
        "rouge": Metric(_WRITING, package="torchmetrics"),
    }
)
"""Loss in nats per label; BLEU and chrF from 0 to 100, as sacrebleu gives them; from accuracy on the others 0 to 1."""

ALWAYS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "causal-lm": ("loss", "perplexity"),
        "seq2seq": ("loss", "perplexity"),
        "classify": ("loss", "accuracy"),
        "tokens": ("loss", "accuracy"),
    }
)
"""What an evaluation in training gives, by task, whatever else is asked for: it costs nothing more."""


def known(task: str) -> tuple[str, ...]:
    """The metrics that fit a task."""
    return tuple(name for name, metric in METRICS.items() if task in metric.tasks)


def of_texts(names: Sequence[str], task: str) -> tuple[str, ...]:
    """Those of some metrics that are about what a model writes: they take a generation."""
    return tuple(name for name in names if task in _WRITING and name not in ALWAYS[task])


def checked(names: Sequence[str], task: str) -> tuple[str, ...]:
    """The metrics asked for, each once.

    Raises:
        ConfigError: one is unknown, does not fit the task, or needs a package that is not here; none is worked out.
    """
    for name in names:
        if name not in METRICS:
            hint = nearest(name, METRICS) or f"known: {listed(list(METRICS), most=len(METRICS))}"
            raise ConfigError(f"metric {name!r} is not known", hint=hint)
        if task not in METRICS[name].tasks:
            raise ConfigError(
                f"metric {name!r} does not fit task {task}", hint=f"known for {task}: {listed(known(task))}"
            )
        package = METRICS[name].package
        if package and find_spec(package) is None:
            raise ConfigError(
                f"metric {name!r} needs {package}, which is not installed", hint="pip install 'lora-kit[eval]'"
            )
    return tuple(dict.fromkeys(names))
