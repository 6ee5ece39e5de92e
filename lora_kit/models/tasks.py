"""The tasks: what each is called here, in PEFT and in transformers, and what its model predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from lora_kit.config.peft_fields import PEFT_TASK_TYPES, find_task_name
from lora_kit.io.text import escape_text

CAUSAL_LM: Final = "causal-lm"
CLASSIFY: Final = "classify"
TOKENS: Final = "tokens"
SEQ2SEQ: Final = "seq2seq"

NEXT, LABEL, LABEL_SET, VALUE, WORD, TARGET = "token", "label", "label-set", "value", "word", "target"
"""Kinds of samples: each token is the label of the position before it; one label for the whole text, any number of
labels, or a number; a label on the first token of each word; an input for an encoder and the tokens that a decoder is
to generate."""
GENERATIVE_KINDS: Final = (NEXT, TARGET)
"""The kinds whose labels are tokens that a model generates."""
TEXT_KINDS: Final = (LABEL, LABEL_SET, VALUE)
"""The kinds of whole texts, of which a model predicts something: those of task `classify`, one for each problem."""

SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single-label", "multi-label", "regression"
PROBLEMS: Final = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)
"""What task `classify` predicts of a text: exactly one label; any number of labels, each by itself; a number."""
PROBLEM_KINDS: Final[Mapping[str, str]] = MappingProxyType(dict(zip(PROBLEMS, TEXT_KINDS, strict=True)))
"""The kind of the samples of each problem."""
PROBLEM_TYPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        SINGLE_LABEL: "single_label_classification",
        MULTI_LABEL: "multi_label_classification",
        REGRESSION: "regression",
    }
)
"""What transformers calls each problem: `problem_type` of a model's config."""
REGRESSION_LABEL: Final = "value"
"""The name of the one output of a head that predicts a number."""


@dataclass(frozen=True)
class TaskSpec:
    """What one task is called in each place, and what its model predicts.

    Attributes:
        name: the `task` of a recipe and of `load_base`.
        auto_class: transformers' class that loads a base with the head of this task.
        architecture_suffix: how the names of its model classes end, as in `architectures` of a base's config.
        sample_kind: what its samples have as labels: `NEXT`, `LABEL`, `WORD` or `TARGET`.
        pipeline_tag: what model hubs call it; None where they have no word for it.
    """

    name: str
    auto_class: str
    architecture_suffix: str
    sample_kind: str
    pipeline_tag: str | None

    @property
    def peft_type(self) -> str:
        """The `task_type` of an adapter's config."""
        return PEFT_TASK_TYPES[self.name]

    @property
    def is_generative(self) -> bool:
        """Whether the model generates text. Otherwise it predicts labels that have names."""
        return self.sample_kind in GENERATIVE_KINDS


TASK_SPECS: Final[Mapping[str, TaskSpec]] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            TaskSpec(CAUSAL_LM, "AutoModelForCausalLM", "ForCausalLM", NEXT, "text-generation"),
            TaskSpec(
                CLASSIFY,
                "AutoModelForSequenceClassification",
                "ForSequenceClassification",
                LABEL,
                "text-classification",
            ),
            TaskSpec(TOKENS, "AutoModelForTokenClassification", "ForTokenClassification", WORD, "token-classification"),
            TaskSpec(SEQ2SEQ, "AutoModelForSeq2SeqLM", "ForConditionalGeneration", TARGET, None),
        )
    }
)
"""A decoder continues a text; one label for a text; one label for each word; an encoder reads a text and a decoder
generates another. By name."""

TASKS: Final = tuple(TASK_SPECS)
_ABILITIES: Final = {
    NEXT: "continues texts",
    TARGET: "writes a text for a text",
    LABEL: "predicts labels of texts",
    WORD: "predicts labels of words",
}
GENERATIVE_TASKS: Final = tuple(spec.name for spec in TASK_SPECS.values() if spec.is_generative)
"""Tasks whose models generate text."""
LABEL_TASKS: Final = tuple(spec.name for spec in TASK_SPECS.values() if not spec.is_generative)
"""Tasks whose labels have names. A checkpoint need not have the head that predicts them."""


def find_task_by_peft_type(peft_type: str | None) -> TaskSpec | None:
    """Return the task that PEFT calls `peft_type`; None where no task is called so."""
    return TASK_SPECS.get(find_task_name(peft_type) or "")


def describe_peft_type(peft_type: str) -> str:
    """Return what a model of one of PEFT's task types does, in words, with the name that it has here, if any."""
    spec = find_task_by_peft_type(peft_type)
    if spec is None:
        return f"PEFT's task type {escape_text(peft_type)}, which is no task of lora-kit"
    return f"task {spec.name}, which {_ABILITIES[spec.sample_kind]}"


def find_problem_by_type(problem_type: str | None) -> str | None:
    """Return the problem that transformers calls `problem_type`; None where none is called so."""
    return next((problem for problem, name in PROBLEM_TYPES.items() if name == problem_type), None)


def infer_task_from_architecture(architecture: str) -> TaskSpec:
    """Return the task of a model class of transformers by the end of its name; `causal-lm` where none matches."""
    matching = (spec for spec in TASK_SPECS.values() if architecture.endswith(spec.architecture_suffix))
    return next(matching, TASK_SPECS[CAUSAL_LM])
