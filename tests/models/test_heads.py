"""Which labels a head has, in which order, and what becomes of a checkpoint's head in a training."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora_kit.adapter.adapter import Adapter
from lora_kit.errors import BaseModelError
from lora_kit.evaluation.evaluate import evaluate
from lora_kit.evaluation.predict import predict
from lora_kit.models.heads import describe_head, order_labels, reason_new_head
from lora_kit.models.loading import load_base
from lora_kit.training.plan.plan import plan
from lora_kit.training.train import train
from tests.support import texts
from tests.support.labeled_bases import POSITIVE_ROWS, save_sentiment_base
from tests.support.sequences import TAGGED, tagger
from tests.support.training import recipe_of


def recipe(folder: Path, rows: list[dict[str, Any]] = POSITIVE_ROWS, **changes: Any) -> dict[str, Any]:
    base = save_sentiment_base(folder / "base")
    return {**recipe_of(folder, rows=rows, **changes), "base": str(base), "task": "classify"}


def test_a_head_that_knows_the_labels_keeps_its_order(tmp_path: Path) -> None:
    report = train(recipe(tmp_path, train={"learning_rate": 1e-9}))
    assert report.before is not None
    assert report.before.accuracy == 5 / 6, "the head of the base predicts the first label, positive"
    adapter = Adapter.load(report.out)
    assert adapter.record["labels"] == ["positive", "negative", "neutral"]
    assert "| labels | positive, negative, neutral |" in (report.out / "README.md").read_text()


def test_a_subset_of_its_labels_keeps_the_head(tmp_path: Path) -> None:
    report = train(recipe(tmp_path, train={"learning_rate": 1e-9}))
    head = load_base(tmp_path / "base", task="classify").model.classifier
    trained = Adapter.load(report.out).tensors
    assert trained["base_model.model.classifier.weight"].shape == (3, 32)
    torch.testing.assert_close(trained["base_model.model.classifier.bias"], head.bias.detach(), atol=1e-6, rtol=0)


def test_evaluation_measures_the_base_with_its_own_order(tmp_path: Path) -> None:
    base = str(save_sentiment_base(tmp_path / "base", labels=("positive", "negative")))
    file = texts.write(tmp_path / "rows.jsonl", POSITIVE_ROWS)
    assert evaluate(base, [None], file).results[0].metrics["accuracy"] == 5 / 6
    out = train({**recipe_of(tmp_path, rows=POSITIVE_ROWS), "base": base, "task": "classify"}).out
    other = Adapter.load(out)
    turned = Adapter(other.config, other.tensors, record={**other.record, "labels": ["negative", "positive"]})
    for adapter in (other, turned):
        report = evaluate(base, [None, adapter], file)
        assert report.results[0].metrics["accuracy"] == 5 / 6, "whatever the order of the adapter beside it"


@pytest.mark.parametrize("labels", [("ham", "spam", "eggs"), ("ham", "spam"), ("a", "b", "c", "d")])
def test_other_labels_get_a_new_head_and_that_is_said(
    tmp_path: Path, labels: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": f"text {number}", "label": label} for number, label in enumerate(labels * 2)]
    asked = recipe(tmp_path, rows)
    would = plan(asked)
    expected = f"new: the base has one, but its labels are positive, negative, neutral, not {', '.join(sorted(labels))}"
    assert would.head == expected == would.to_json()["head"]
    report = train(asked)
    assert Adapter.load(report.out).record["labels"] == sorted(labels)
    assert "the one in the checkpoint is not used" in caplog.text
    numbers = {label: number for number, label in enumerate(sorted(labels))}
    one, two = (load_base(tmp_path / "base", task="classify", label2id=numbers) for _ in range(2))
    assert torch.equal(one.model.classifier.weight, two.model.classifier.weight)
    assert one.model.classifier.weight.std() < 0.1, "the head of the checkpoint has weights of 1"
    assert one.model.classifier.bias.count_nonzero() == 0
    # The adapter, which brings its head, is measured on a base of its own size.
    assert len(evaluate(str(tmp_path / "base"), [report.out], asked["data"]["train"]).results) == 1


def test_numbers_are_the_labels_of_a_head_without_names(tmp_path: Path) -> None:
    base = save_sentiment_base(tmp_path / "base", labels=("LABEL_0", "LABEL_1", "LABEL_2"))
    rows = [{"text": row["text"], "label": int(row["label"] == "negative")} for row in POSITIVE_ROWS]
    asked = {**recipe_of(tmp_path, rows=rows), "base": str(base), "task": "classify"}
    assert Adapter.load(train(asked).out).record["labels"] == ["0", "1", "2"]
    assert evaluate(str(base), [None], asked["data"]["train"]).results[0].metrics["accuracy"] == 5 / 6


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (("LABEL_0", "LABEL_1"), "names no labels, and LABEL_0 is taken for negative, LABEL_1 for positive"),
        (("positive", "negative"), ""),
    ],
)
def test_figures_of_a_head_without_names_are_said_to_be_a_guess(
    tmp_path: Path, labels: tuple[str, ...], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    base = str(save_sentiment_base(tmp_path / "base", labels=labels))
    out = train({**recipe_of(tmp_path, rows=POSITIVE_ROWS), "base": base, "task": "classify"}).out
    file = texts.write(tmp_path / "rows.jsonl", POSITIVE_ROWS)
    evaluate(base, [out], file)
    assert "say little" not in caplog.text
    evaluate(base, [None, out], file)
    assert ("say little" in caplog.text) == bool(reason)
    assert reason in caplog.text


def test_words_are_measured_with_the_order_of_the_head_whatever_the_order_of_the_adapter(tmp_path: Path) -> None:
    base, folder = tagger(), str(tmp_path / "base")
    base.model.config.id2label, base.model.config.label2id = {0: "P", 1: "O", 2: "L"}, {"P": 0, "O": 1, "L": 2}
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    asked = {**recipe_of(tmp_path, rows=TAGGED), "base": folder, "task": "tokens"}
    other, file = Adapter.load(train(asked).out), asked["data"]["train"]
    alone = evaluate(folder, [None], file).results[0].metrics
    turned = Adapter(other.config, other.tensors, record={**other.record, "labels": ["L", "O", "P"]})
    for adapter in (other, turned):
        assert evaluate(folder, [None, adapter], file).results[0].metrics == alone


def test_words_have_the_order_of_the_head_too(tmp_path: Path) -> None:
    base = tagger()
    base.model.config.id2label = {0: "P", 1: "O", 2: "L"}
    base.model.config.label2id = {"P": 0, "O": 1, "L": 2}
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    asked = {**recipe_of(tmp_path, rows=TAGGED), "base": str(tmp_path / "base"), "task": "tokens"}
    assert plan(asked).head == "of the base, with the labels P, O, L"
    assert Adapter.load(train(asked).out).record["labels"] == ["P", "O", "L"]


def test_named_labels_in_another_order_do_not_get_the_rows_of_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_sentiment_base(tmp_path / "base", labels=("positive", "negative"))
    with caplog.at_level(logging.WARNING):
        base = load_base(folder, task="classify", label2id={"negative": 0, "positive": 1})
    assert "in another order" in caplog.text
    assert base.model.classifier.bias.count_nonzero() == 0
    named = load_base(folder, task="classify", label2id={"positive": 0, "negative": 1})
    assert named.model.classifier.bias.argmax() == 0


def test_a_number_of_labels_that_the_head_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"could not be read|another shape"):
        load_base(save_sentiment_base(tmp_path / "base"), task="classify", num_labels=7)


def test_a_checkpoint_of_another_task_has_no_head(tmp_path: Path) -> None:
    folder = save_sentiment_base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    asked = {**recipe_of(tmp_path, rows=POSITIVE_ROWS), "base": str(folder), "task": "classify"}
    assert plan(asked).head == "new: the base has none for this task"
    assert Adapter.load(train(asked).out).record["labels"] == ["negative", "positive"]


def test_the_order_and_the_reason() -> None:
    head = ("positive", "negative", "neutral")
    assert order_labels(["negative", "positive"], head) == head
    assert order_labels(["bad", "positive"], head) == ("bad", "positive")
    assert reason_new_head(head, head) is None
    assert reason_new_head((), ("a", "b")) is None
    assert reason_new_head(("LABEL_0", "LABEL_1"), ("a", "b")) is None
    assert describe_head(head, head) == "of the base, with the labels positive, negative, neutral"


def test_an_end_that_is_written_in_a_text_is_text_for_a_classifier_that_reads_the_last_end(tmp_path: Path) -> None:
    """The heads of BART and T5 want as many ends in each text of a batch."""
    tokenizer = texts.bert_tokenizer()
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    transformers.BartForSequenceClassification(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"text": text, "label": label} for text, label in (("plain", "a"), ("an </s> end", "b"), ("</s></s>", "a"))]
    asked = {**recipe_of(tmp_path, rows=rows), "base": str(tmp_path / "base"), "task": "classify"}
    out = train(asked).out
    together = predict(str(tmp_path / "base"), out, [row["text"] for row in rows])
    alone = [predict(str(tmp_path / "base"), out, [row["text"]])[0] for row in rows]
    assert [each.label for each in together] == [each.label for each in alone]
