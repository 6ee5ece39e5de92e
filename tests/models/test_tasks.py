"""The table of tasks: its names are those of PEFT and transformers, and every task is found by them."""

from __future__ import annotations

import pytest
import transformers

from lora_kit.data.layouts import FORMATS
from lora_kit.evaluation.metrics import BASIC_METRICS
from lora_kit.models.tasks import (
    GENERATIVE_TASKS,
    LABEL_TASKS,
    TASK_SPECS,
    TASKS,
    TaskSpec,
    find_task_by_peft_type,
    infer_task_from_architecture,
)
from tests.support import tiny

every_task = pytest.mark.parametrize("spec", TASK_SPECS.values(), ids=TASKS)


@every_task
def test_the_names_are_those_of_peft_and_transformers(spec: TaskSpec) -> None:
    peft = pytest.importorskip("peft")
    assert spec.peft_type in {kind.value for kind in peft.TaskType}
    assert hasattr(transformers, spec.auto_class)


@every_task
def test_a_task_is_found_by_its_name_in_peft(spec: TaskSpec) -> None:
    assert find_task_by_peft_type(spec.peft_type) is spec


def test_a_name_that_is_no_task_finds_none() -> None:
    assert find_task_by_peft_type(None) is None
    assert find_task_by_peft_type("QUESTION_ANS") is None


def test_a_task_is_found_by_the_class_of_a_model() -> None:
    found = [type(model).__name__ for model in (tiny.llama(), tiny.bert())]
    assert [infer_task_from_architecture(name).name for name in found] == ["causal-lm", "classify"]
    assert infer_task_from_architecture("BertForTokenClassification").name == "tokens"
    assert infer_task_from_architecture("T5ForConditionalGeneration").name == "seq2seq"
    assert infer_task_from_architecture("GPT2LMHeadModel").name == "causal-lm"


def test_a_task_either_generates_text_or_predicts_labels() -> None:
    assert {*GENERATIVE_TASKS, *LABEL_TASKS} == set(TASKS)
    assert not {*GENERATIVE_TASKS} & {*LABEL_TASKS}


def test_every_task_has_formats_and_metrics() -> None:
    assert set(FORMATS) == set(BASIC_METRICS) == set(TASKS)
