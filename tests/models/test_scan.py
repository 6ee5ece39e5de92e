"""The scan of all model classes finds what works and what does not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers
from torch import Tensor, nn

from tools.scan_models.__main__ import RESULTS, list_classes
from tools.scan_models.page import PAGE, write_page
from tools.scan_models.trial import FAILS, NOT_TRIED, REFUSED, WORKS, try_class


class Bypassing(transformers.BertForSequenceClassification):
    """A model that reads a weight past its layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        dense = self.bert.encoder.layer[0].output.dense
        weight: Tensor = dense.base_layer.weight if hasattr(dense, "base_layer") else dense.weight
        dense.forward = lambda x: nn.functional.linear(x, weight)
        try:
            return super().forward(*args, **kwargs)
        finally:
            del dense.forward


class Broken(transformers.BertForSequenceClassification):
    """A model that does not run."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("it does not run")


@pytest.mark.parametrize(
    ("kind", "status", "detail"),
    [
        (transformers.BertForSequenceClassification, WORKS, "13 layers"),
        (transformers.GPTJForCausalLM, WORKS, "12 layers"),
        (transformers.ResNetForImageClassification, REFUSED, "all-linear"),
        (Bypassing, FAILS, "bypassed: bert.encoder.layer.0.output.dense"),
        (Broken, NOT_TRIED, "it does not run"),
    ],
)
def test_an_outcome_is_what_happens(kind: Any, status: str, detail: str) -> None:
    outcome = try_class(kind)
    assert outcome.status == status, outcome
    assert detail in outcome.detail


def test_one_class_of_each_family_comes_first() -> None:
    classes = list_classes()
    families = list(classes.values())
    assert len(set(families[: len(set(families))])) == len(set(families))
    assert classes["BertLMHeadModel"] == "bert"
    assert "BertPreTrainedModel" not in classes


def test_the_page_is_that_of_the_results(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.scan_models.page.PAGE", tmp_path / "page.md")
    write_page(json.loads(RESULTS.read_text())["classes"], total=len(list_classes()))
    assert (tmp_path / "page.md").read_text() == PAGE.read_text()
