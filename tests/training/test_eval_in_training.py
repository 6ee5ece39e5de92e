"""Validation by other metrics than the loss: only when a recipe asks, and the best adapter is told by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_kit.errors import DataError, RecipeError
from lora_kit.evaluation.evaluate import evaluate
from lora_kit.models.loading import Base
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.results import TrainReport
from lora_kit.training.train import train
from tests.support import texts, tiny
from tests.support.sequences import both
from tests.support.training import recipe_of

PAIRS = [{"prompt": "a", "completion": "bb"}, {"prompt": "c", "completion": "d"}, {"prompt": "a", "completion": "e"}]
LABELED = [{"text": word * n, "label": label} for word, label in (("good ", "yes"), ("bad ", "no")) for n in (1, 2, 3)]
EVERY_TWO = {"eval_strategy": "steps", "eval_steps": 2}


def llama() -> Base:
    return Base(model=tiny.llama(), tokenizer=texts.tokenizer(), name="tiny")


def classifier() -> Base:
    return Base(model=tiny.bert(labels=2), tokenizer=texts.bert_tokenizer(), name="tiny", task="classify")


def found(report: TrainReport, metric: str) -> dict[int, float]:
    """A metric of the validations, by step."""
    return {entry["step"]: entry[f"eval_{metric}"] for entry in report.history if f"eval_{metric}" in entry}


@pytest.mark.parametrize(
    ("metric", "task", "make", "steps"),
    [
        ("f1", "classify", classifier, 10),
        ("chrf", "causal-lm", llama, 10),
        ("rouge", "seq2seq", both, 10),
    ],
)
def test_the_adapter_that_is_best_by_a_metric_is_kept(
    tmp_path: Path, metric: str, task: str, make: Any, steps: int
) -> None:
    rows = LABELED if task == "classify" else PAIRS
    section = {**EVERY_TWO, "metric_for_best_model": metric, "learning_rate": 1e-2}
    base = make()
    report = train(recipe_of(tmp_path, rows=rows, steps=steps, train=section, task=task), base=base)
    values = found(report, metric)
    assert sorted(values) == list(range(0, steps + 1, 2))
    assert len(set(values.values())) > 1
    del values[0]  # before the training, where there is nothing to keep
    assert report.kept == max(values, key=lambda step: (values[step], -step))
    assert report.after is not None
    assert report.after.metrics()[metric] == max(values.values())
    again = evaluate(base, [report.out], tmp_path / "rows.jsonl", metrics=[metric, "loss"]).results[0]
    assert again.metrics == pytest.approx({metric: max(values.values()), "loss": report.after.loss}, abs=1e-5)


def test_nothing_is_generated_in_validation_unless_a_metric_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counted(exams: Any, **settings: Any) -> Any:
        asked.append(len(exams[""].rows))
        return generate_completions(exams, **settings)

    from lora_kit.evaluation.generation_metrics import generate_completions

    monkeypatch.setattr("lora_kit.evaluation.measure.generate_completions", counted)
    report = train(recipe_of(tmp_path, rows=PAIRS, train=EVERY_TWO, steps=2), base=llama())
    assert report.after is not None
    assert (asked, set(report.after.metrics())) == ([], {"loss", "perplexity"})
    section = {**EVERY_TWO, "metric_for_best_model": "chrf"}
    changes = {"train": section, "out": str(tmp_path / "asked")}
    report = train(recipe_of(tmp_path, rows=PAIRS, steps=2, **changes), base=llama())
    assert report.after is not None
    # Before, at step 2, and not once more after it. Two rows have one prompt.
    assert (asked, set(report.after.metrics())) == ([2, 2], {"loss", "perplexity", "chrf"})


def test_writing_in_validation_changes_nothing_that_is_trained(tmp_path: Path) -> None:
    digests = []
    for name, metric in (("loss", "loss"), ("texts", "exact_match")):
        section = {**EVERY_TWO, "metric_for_best_model": metric, "load_best_model_at_end": False}
        section |= {"gradient_checkpointing": True, "per_device_train_batch_size": 2}
        changes = {"lora": {"lora_dropout": 0.3}, "train": section, "out": str(tmp_path / name)}
        report = train(recipe_of(tmp_path, rows=PAIRS, steps=6, **changes), base=llama())
        assert (len(found(report, "exact_match")) == 4) is (metric == "exact_match")
        digests.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"metric_for_best_model": "exact_mach"}, "did you mean 'exact_match'"),
        ({"metric_for_best_model": "f1"}, "does not fit task causal-lm"),
        ({"metric_for_best_model": "bleu", "eval_strategy": "no"}, "eval_strategy is no"),
    ],
    ids=str,
)
def test_a_metric_that_cannot_tell_the_best_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_recipe(recipe_of(tmp_path, rows=PAIRS, train={**EVERY_TWO, **changes}))


def test_which_way_is_better_is_known_from_the_metric(tmp_path: Path) -> None:
    for metric, higher in (("bleu", True), ("perplexity", False), ("loss", False)):
        recipe = load_recipe(recipe_of(tmp_path, rows=PAIRS, train={**EVERY_TWO, "metric_for_best_model": metric}))
        assert (recipe.train["greater_is_better"], recipe.train["load_best_model_at_end"]) == (higher, True)


def test_texts_without_prompts_have_nothing_that_could_be_asked(tmp_path: Path) -> None:
    section = {**EVERY_TWO, "metric_for_best_model": "bleu"}
    with pytest.raises(DataError, match="have no prompts"):
        train(recipe_of(tmp_path, rows=[{"text": "one two"}], train=section), base=llama())
    assert not (tmp_path / "out").exists()
