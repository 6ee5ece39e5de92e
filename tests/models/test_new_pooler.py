"""An encoder saved as a masked language model has no pooler: a new one belongs to the new head, and goes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lora_kit as lk
from tests.support import texts, tiny
from tests.support.training import LABELED, recipe_of


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    transformers.BertForMaskedLM(tiny.bert().config).save_pretrained(tmp_path / "base")
    texts.bert_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**tiny.batch()).logits
    return logits


@pytest.mark.parametrize("method", ["lora", "features"])
def test_a_new_pooler_is_trained_and_saved_with_the_head(base: Path, tmp_path: Path, method: str) -> None:
    import peft

    report = lk.train(
        recipe_of(tmp_path, rows=LABELED, base=str(base), task="classify", method=method, out=str(tmp_path / "one"))
    )
    adapter = lk.Adapter.load(report.out)
    fresh = lk.load_base(base, task="classify", num_labels=2)
    before = fresh.model.bert.pooler.dense.weight
    assert fresh.new_modules == ("bert.pooler",)
    trained = adapter.saved()["bert.pooler.dense.weight"]
    assert trained.shape == before.shape
    assert not torch.equal(trained, before)
    bank = lk.attach(fresh.model, slots=1)
    bank.load("one", report.out)
    bank.use("one")
    torch.manual_seed(5)  # in PEFT the pooler and the head begin with other numbers
    other: Any = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    torch.testing.assert_close(logits_of(fresh.model), logits_of(peft.PeftModel.from_pretrained(other, report.out)))
    lk.merge(str(base), report.out, tmp_path / "merged")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), logits_of(fresh.model), rtol=1e-4, atol=1e-5)


def test_another_missing_layer_is_still_an_error(base: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = base / "model.safetensors"
    tensors = {key: value for key, value in load_file(file).items() if "layer.1.attention.self.query" not in key}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(lk.LoraKitError, match=r"layer\.1\.attention\.self\.query"):
        lk.load_base(base, task="classify", num_labels=2)


def test_a_base_with_a_pooler_keeps_it(tmp_path: Path) -> None:
    tiny.bert().save_pretrained(tmp_path / "base")
    texts.bert_tokenizer().save_pretrained(tmp_path / "base")
    assert lk.load_base(tmp_path / "base", task="classify", num_labels=3).new_modules == ()


@pytest.mark.parametrize(("problem", "labels"), [("multi-label", ["a", "b", "c"]), ("regression", ["value"])])
def test_a_merged_model_says_what_its_head_predicts(tmp_path: Path, problem: str, labels: list[str]) -> None:
    tiny.bert().bert.save_pretrained(tmp_path / "base")
    texts.bert_tokenizer().save_pretrained(tmp_path / "base")
    base = lk.load_base(tmp_path / "base", task="classify", problem=problem, num_labels=len(labels))
    config = lk.LoraConfig(r=2, target_modules=("query",), modules_to_save=("classifier",), task_type="SEQ_CLS")
    bank = lk.attach(base.model, config, name="one")
    bank.save("one", tmp_path / "one", record={"labels": labels, "problem": problem})
    lk.merge(str(tmp_path / "base"), tmp_path / "one", tmp_path / "merged")
    found: Any = transformers.AutoConfig.from_pretrained(tmp_path / "merged")
    expected = {"multi-label": "multi_label_classification", "regression": "regression"}
    assert found.problem_type == expected[problem]
    assert [found.id2label[number] for number in range(found.num_labels)] == labels
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    target = torch.ones(3, len(labels)) if problem == "multi-label" else torch.ones(3)
    assert torch.isfinite(model(**tiny.batch(), labels=target).loss)
