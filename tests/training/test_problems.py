"""Several labels, numbers, pairs and weights: the loss of transformers, what is learned, and what a record says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional

from lora_kit.adapter.adapter import Adapter
from lora_kit.bank.attach import attach
from lora_kit.data.batches import Collator
from lora_kit.data.encode import encode
from lora_kit.data.label_problem import list_label_names, resolve_problem
from lora_kit.data.preparation.prepare import prepare
from lora_kit.data.rows import read_rows
from lora_kit.errors import RecipeError
from lora_kit.evaluation.evaluate import evaluate
from lora_kit.evaluation.label_loss import LabelLoss
from lora_kit.models.loading import Base
from lora_kit.models.tasks import PROBLEM_TYPES, PROBLEMS
from lora_kit.training.recipe.class_weights import compute_class_weights
from lora_kit.training.train import train
from tests.support import texts, tiny
from tests.support.problems import ROWS, SINGLE, SIZES, learnable_rows, one_step, steady_base
from tests.support.sequences import TAGGED, tagger
from tests.support.training import recipe_of, same_state, state


def trained_weights(folder: Path, rows: list[dict[str, Any]], problem: str = "single-label", **changes: Any) -> Any:
    """The weights after one step of ours."""
    folder.mkdir(exist_ok=True)
    report = train(one_step(folder, rows, **changes), base=steady_base(problem), replace=True)
    return transformers.AutoModelForSequenceClassification.from_pretrained(report.out).state_dict()


def assert_same_weights(one: Any, other: Any) -> None:
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=0, atol=2e-6)


def encoded(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Any:
    found = read_rows(texts.write(folder / "some.jsonl", rows))
    problem = resolve_problem(found, None)
    label2id = {name: number for number, name in enumerate(list_label_names(found, problem))}
    options = {"max_length": 64, "label2id": label2id, "problem": problem, **options}
    return encode(found, options.pop("tokenizer", None) or texts.bert_tokenizer(), **options)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_step_is_that_of_transformers_own_loss_of_all_rows_at_once(tmp_path: Path, problem: str) -> None:
    """Micro-batches of two, the last of one; lengths differ, so rows are padded and bucketed here and not there."""
    ours = trained_weights(tmp_path, ROWS[problem], problem)
    base = steady_base(problem)
    base.model.config.problem_type = PROBLEM_TYPES[problem]
    samples = encoded(tmp_path, ROWS[problem])
    optimizer = torch.optim.SGD(base.model.parameters(), lr=0.5)
    batch = Collator(texts.PAD)([samples[index] for index in range(len(samples))])
    before = state(base.model)
    base.model.train()(**batch).loss.backward()
    optimizer.step()
    assert not same_state(base.model, before)
    assert_same_weights(ours, base.model.state_dict())


def test_a_loss_with_weights_of_classes_is_that_of_torch() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 2, 1, 1, 0, 2])
    loss = LabelLoss("label", (0.5, 2.0, 3.0))
    expected = functional.cross_entropy(logits, labels, torch.tensor([0.5, 2.0, 3.0]), label_smoothing=0.1)
    torch.testing.assert_close(loss.sum(logits, labels, smoothing=0.1) / loss.count(labels), expected)
    sets = torch.randint(0, 2, (6, 3)).float()
    several = LabelLoss("label-set", (0.5, 2.0, 3.0))
    expected = functional.binary_cross_entropy_with_logits(logits, sets, pos_weight=torch.tensor([0.5, 2.0, 3.0]))
    torch.testing.assert_close(several.sum(logits, sets) / several.count(sets), expected)
    words = torch.tensor([[0, -100, 2], [-100, 1, 1]])
    scores = torch.randn(2, 3, 3)
    of_words = LabelLoss("word", (0.5, 2.0, 3.0))
    expected = functional.cross_entropy(scores.flatten(0, 1), words.flatten(), torch.tensor([0.5, 2.0, 3.0]))
    torch.testing.assert_close(of_words.sum(scores, words) / of_words.count(words), expected)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_row_of_weight_two_is_a_row_that_is_there_twice(tmp_path: Path, problem: str) -> None:
    rows = ROWS[problem]
    weighted = [{**row, "weight": 2.0 if number == 1 else None} for number, row in enumerate(rows)]
    twice = [*rows, rows[1]]
    assert_same_weights(
        trained_weights(tmp_path / "a", weighted, problem), trained_weights(tmp_path / "b", twice, problem)
    )


def test_words_of_weight_two_are_words_that_are_there_twice(tmp_path: Path) -> None:
    """So they are in what `prepare` writes of them."""
    weighted = [{**row, "weight": 2.0 if number == 1 else None} for number, row in enumerate(TAGGED)]
    prepare(texts.write(tmp_path / "rows.jsonl", weighted), tmp_path / "prepared", share=0)
    rows = [json.loads(line) for line in (tmp_path / "prepared" / "train.jsonl").read_text().splitlines()]
    assert [row.get("weight") for row in rows if row["words"] == TAGGED[1]["words"]] == [2.0]
    for name in "ab":
        (tmp_path / name).mkdir()
    once, again = (
        train(one_step(tmp_path / name, given) | {"task": "tokens"}, base=tagger(), replace=True).out
        for name, given in (("a", rows), ("b", [*TAGGED, TAGGED[1]]))
    )
    read = transformers.AutoModelForTokenClassification.from_pretrained
    assert_same_weights(read(once).state_dict(), read(again).state_dict())
    measured = evaluate(str(once), [None], tmp_path / "a" / "rows.jsonl")
    assert [case.expected for case in measured.cases] == [tuple(row["labels"]) for row in rows]


def test_balanced_weights_make_labels_weigh_the_same(tmp_path: Path) -> None:
    """x is there three times, y and z once: as if y and z were there three times each."""
    assert compute_class_weights("balanced", "xyz", [3, 1, 1], problem="single-label", total=5) == (
        5 / 9, 5 / 3, 5 / 3,
    )  # fmt: skip
    assert compute_class_weights("balanced", "ab", [1, 4], problem="multi-label", total=5) == (4.0, 0.25)
    rare = [row for row in SINGLE if row["label"] in "yz"]
    expected = trained_weights(tmp_path / "a", [*SINGLE, *rare, *rare])
    assert_same_weights(trained_weights(tmp_path / "b", SINGLE, class_weights="balanced"), expected)
    assert_same_weights(trained_weights(tmp_path / "c", SINGLE, class_weights={"y": 3, "z": 3}), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_weights": {"q": 2}}, "class_weights has 'q', which is not a label"),
        ({"class_weights": {"x": 0}}, "class_weights.x must be a number above 0; 0 was given"),
        ({"class_weights": "even"}, "class_weights must be balanced or a mapping; 'even' was given"),
        ({"problem": "regression", "class_weights": "balanced"}, "which problem regression has not"),
        ({"problem": "multilabel"}, "problem 'multilabel' is not known"),
        ({"task": "tokens", "problem": "multi-label"}, "problem is for task classify"),
        ({"train": {"metric_for_best_model": "pearson"}}, "metric 'pearson' does not fit problem single-label"),
        ({"train": {"metric_for_best_model": "f1_per_label"}}, "is not one number"),
    ],
)
def test_what_does_not_fit_the_labels_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    settings = {"task": "classify", "train": {"eval_strategy": "steps", **changes.pop("train", {})}, **changes}
    with pytest.raises(RecipeError, match=message):
        train(recipe_of(tmp_path, rows=SINGLE, **settings), base=steady_base())


@pytest.fixture(scope="module", params=["multi-label", "regression"])
def learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any, Base]:
    """A problem, an adapter trained on it, the report and the base."""
    problem, folder = request.param, tmp_path_factory.mktemp(request.param)
    recipe = recipe_of(
        folder, rows=learnable_rows(problem, 160, seed=1), steps=80, task="classify",
        train={"per_device_train_batch_size": 16, "save_strategy": "no", "lr_scheduler_type": "constant"},
    )  # fmt: skip
    recipe["data"]["validation"] = str(texts.write(folder / "valid.jsonl", learnable_rows(problem, 60, seed=2)))
    base = steady_base(problem)
    if problem == "multi-label":
        base = Base(model=tiny.bert(labels=2), tokenizer=base.tokenizer, name="tiny", task="classify")
    return problem, Path(recipe["out"]), train(recipe, base=base), base


def test_labels_and_numbers_are_learned_beyond_chance(learned: tuple[str, Path, Any, Base]) -> None:
    problem, _, report, _ = learned
    before, after = report.before.metrics(), report.after.metrics()
    assert after["loss"] < 0.85 * before["loss"]
    if problem == "multi-label":
        assert after["accuracy"] > before["accuracy"] + 0.3
    else:
        assert after["mae"] < 0.7 * before["mae"]


def test_an_evaluation_has_the_figures_of_the_training(learned: tuple[str, Path, Any, Base]) -> None:
    problem, out, report, base = learned
    measured = evaluate(base, [out], out.parent / "valid.jsonl", out=out.parent / "said.jsonl", replace=True)
    metrics = measured.results[0].metrics
    for name, value in report.after.metrics().items():
        assert metrics[name] == pytest.approx(value, abs=1e-5)
    expected = ("f1_micro", "f1_macro") if problem == "multi-label" else ("pearson", "spearman")
    assert all(metrics[name] > 0.6 for name in expected)
    line = json.loads((out.parent / "said.jsonl").read_text().splitlines()[0])
    assert isinstance(line["expected"], list if problem == "multi-label" else str)


def test_the_record_says_the_problem_and_peft_reads_the_adapter(learned: tuple[str, Path, Any, Base]) -> None:
    import peft

    problem, out, report, base = learned
    record = Adapter.load(out).record
    assert record["problem"] == problem == record["recipe"]["problem"]
    assert record["labels"] == (["a", "b"] if problem == "multi-label" else ["value"])
    assert (len(record.get("thresholds", [])) == 2) is (problem == "multi-label") is bool(report.thresholds)
    batch = tiny.batch()
    model: Any = peft.PeftModel.from_pretrained(tiny.bert(labels=base.model.config.num_labels), out).eval()
    ours = tiny.bert(labels=base.model.config.num_labels)
    bank = attach(ours, slots=1)
    bank.load("one", out)
    bank.use("one")
    torch.testing.assert_close(tiny.logits(ours, batch), tiny.logits(model, batch))


def test_the_base_learns_nothing_of_it(learned: tuple[str, Path, Any, Base]) -> None:
    problem, _, _, base = learned
    assert same_state(base.model, state(tiny.bert(labels=2 if problem == "multi-label" else SIZES[problem])))


def test_a_set_of_labels_is_not_trimmed_with_the_padding(tmp_path: Path) -> None:
    """More classes than the shortest part has tokens."""
    rows = [{"text": "a", "labels": list("abcdefgh")}, {"text": "a" * 60, "labels": ["a"]}]
    report = train(
        recipe_of(tmp_path, rows=rows, steps=1, task="classify"),
        base=Base(model=tiny.bert(labels=8), tokenizer=texts.bert_tokenizer(), name="tiny", task="classify"),
    )
    assert report.after.labels == 2 * 8


@pytest.mark.parametrize("kind", ["bert", "distilbert", "bert-of-one-type"])
def test_types_of_tokens_are_given_to_models_that_read_them(tmp_path: Path, kind: str) -> None:
    rows = [{"text": "ab", "text_pair": "cd", "label": "x"}, {"text": "ab", "text_pair": "c", "label": "y"}]
    if kind == "distilbert":
        config = transformers.DistilBertConfig(
            vocab_size=96, dim=32, n_layers=1, n_heads=4, hidden_dim=48, num_labels=2
        )
        model: Any = transformers.DistilBertForSequenceClassification(config)
    else:
        config = tiny.bert(labels=2).config
        config.type_vocab_size = 2 if kind == "bert" else 1
        model = transformers.BertForSequenceClassification(config)
    seen: list[bool] = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("token_type_ids") is not None), with_kwargs=True
    )
    base = Base(model=model.eval(), tokenizer=texts.pair_tokenizer(), name="tiny", task="classify")
    report = train(recipe_of(tmp_path, rows=rows, steps=1, task="classify"), base=base)
    evaluate(base, [report.out], tmp_path / "rows.jsonl")
    assert set(seen) == {kind == "bert"}
