"""The scan of all model classes finds what works and what does not."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import transformers
from torch import Tensor, nn

from tools.scan_models.__main__ import RESULTS, list_classes, take_share
from tools.scan_models.page import PAGE, write_page
from tools.scan_models.trial import CUT, FAILS, NOT_TRIED, REFUSED, WORKS, Outcome, try_class
from tools.scan_models.worker import Worker


class Bypassing(transformers.BertForSequenceClassification):
    """A model that reads a weight past its layer."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        dense = self.bert.encoder.layer[0].output.dense
        weight: Tensor = dense.base_layer.weight if hasattr(dense, "base_layer") else dense.weight
        dense.forward = lambda x: nn.functional.linear(x, weight)
        try:
            return super().forward(input_ids, **kwargs)
        finally:
            del dense.forward


class Broken(transformers.BertForSequenceClassification):
    """A model that does not run."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        raise RuntimeError("it does not run")


@pytest.mark.parametrize(
    ("kind", "status", "detail"),
    [
        (transformers.BertForSequenceClassification, WORKS, "13 layers"),
        (transformers.GPTJForCausalLM, WORKS, "12 layers"),
        (transformers.ResNetForImageClassification, WORKS, "16 convolutions"),
        (transformers.BertForMultipleChoice, WORKS, "13 layers"),
        (transformers.IBertModel, REFUSED, "all-linear"),
        (Bypassing, FAILS, "bypassed: bert.encoder.layer.0.output.dense"),
        (Broken, NOT_TRIED, "it does not run"),
    ],
)
def test_an_outcome_is_what_happens(kind: Any, status: str, detail: str) -> None:
    outcome = try_class(kind)
    assert outcome.status == status, outcome
    assert detail in outcome.detail


def test_rows_and_merges_are_tried_or_refused_with_a_reason() -> None:
    llama = try_class(transformers.LlamaForCausalLM)
    assert (llama.rows, llama.merge) == ("yes", "yes")
    assert "an expert does not see which row" in try_class(transformers.JetMoeModel).rows
    assert "WeightStandardizedConv2d" in try_class(transformers.BitModel).merge


def test_classes_are_listed_by_family_and_shared_out_by_family() -> None:
    families = list_classes()
    assert list(families.values()) == sorted(families.values())
    assert families["BertLMHeadModel"] == "bert"
    assert "BertPreTrainedModel" not in families
    shares = [take_share(families, families, f"{part}/3") for part in (1, 2, 3)]
    assert sorted(name for share in shares for name in share) == sorted(families)
    owners = [{families[name] for name in share} for share in shares]
    assert sum(map(len, owners)) == len(set(families.values()))


def test_a_class_that_ends_its_process_is_cut_and_the_next_one_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "Ending", property(lambda _: os._exit(3)), raising=False)
    monkeypatch.setattr("tools.scan_models.worker.try_class", lambda kind: kind.fget(None))
    worker = Worker()
    try:
        assert worker.try_class("Ending") == Outcome(CUT, "the process ended with 3")
        assert worker.try_class("NoSuchModel").status == NOT_TRIED
    finally:
        worker.close()


def test_the_page_is_that_of_the_results(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.scan_models.page.PAGE", tmp_path / "page.md")
    write_page(json.loads(RESULTS.read_text())["classes"], total=len(list_classes()))
    assert (tmp_path / "page.md").read_text() == PAGE.read_text()
