"""Faults of labels, columns, lengths and training arguments: what would be trained as something else, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
import yaml

from lora_kit.data.label_problem import resolve_problem
from lora_kit.data.preparation.prepare import prepare
from lora_kit.data.rows import read_rows
from lora_kit.errors import BaseModelError, DataError, LoraKitError, RecipeError
from lora_kit.evaluation.evaluate import evaluate
from lora_kit.models.loading import load_input_spec
from lora_kit.training.plan.plan import plan
from lora_kit.training.recipe.load import load_recipe
from tests.faults.fault import Act, Fault
from tests.support import texts, tiny
from tests.support.labeled_bases import POSITIVE_ROWS, save_sentiment_base
from tests.support.sequences import t5

PREPARE = ("prepare", "rows.jsonl", "--base", "base", "--out", "prepared", "--replace")
PLAN = ("train", "recipe.yaml", "--dry-run")


def _rows(*rows: dict[str, Any]) -> Act:
    return lambda folder: texts.write(folder / "rows.jsonl", rows)


def _csv(text: str) -> Act:
    return lambda folder: (folder / "rows.csv").write_text(text, "utf-8")


def _prepare(**options: Any) -> Act:
    def act(folder: Path) -> None:
        file = next(path for path in folder.iterdir() if path.name.startswith("rows."))
        prepare(file, folder / "prepared", base=str(folder / "base"), replace=True, **options)

    return act


def _recipe(folder: Path, base: str, **fields: Any) -> None:
    recipe = {"base": str(folder / base), "data": {"train": str(folder / "rows.jsonl")}, "out": str(folder / "out")}
    recipe |= {"train": {"max_steps": 1, "per_device_train_batch_size": 2}, **fields}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")


def _plan(folder: Path) -> None:
    plan(folder / "recipe.yaml")


# Labels that a head knows


def _sentiment(*labels: str) -> Act:
    def make(folder: Path) -> None:
        save_sentiment_base(folder / "sentiment", labels=labels)
        texts.write(folder / "rows.jsonl", POSITIVE_ROWS)
        _recipe(folder, "sentiment", task="classify")

    return make


def _evaluate(folder: Path) -> None:
    out = folder / "answers.jsonl"
    evaluate(str(folder / "sentiment"), [None], folder / "rows.jsonl", out=out, replace=True)


def _check_answers(folder: Path) -> None:
    """The head gives every text its first label, positive."""
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text("utf-8").splitlines()]
    assert len(answers) == len(POSITIVE_ROWS)
    assert all(answer["said"] == {"base": "positive"} for answer in answers), answers


def _plan_with_other_labels(folder: Path) -> None:
    found = plan(folder / "recipe.yaml").head
    assert found.startswith("new: the base has one, but its labels are ham, spam"), found


# Columns


def _read_pairs(folder: Path) -> None:
    found = read_rows(folder / "rows.jsonl").values
    assert found == ((("a", "b"), "x"), (("c", "d"), "y", 2.0)), found


def _read_numbers(folder: Path) -> None:
    rows = read_rows(folder / "rows.csv")
    assert resolve_problem(rows, None) == "regression"


def _read_preferences(folder: Path) -> None:
    rows = read_rows(folder / "rows.jsonl")
    assert rows.format != "completion", "what is not wanted would be learned"


# Lengths and tokens


def _pad_outside(folder: Path) -> None:
    """A tokenizer that has one token more than the base: padding, then one that the rows use."""
    tokenizer = texts.bert_tokenizer()
    tokenizer.add_tokens(["<new>"])
    model = tiny.bert(labels=2)
    model.resize_token_embeddings(tokenizer.convert_tokens_to_ids("<new>"))
    model.save_pretrained(folder / "short")
    tokenizer.save_pretrained(folder / "short")
    texts.write(folder / "rows.jsonl", [{"text": "a <new>", "label": "x"}, {"text": "b", "label": "y"}])
    _recipe(folder, "short", task="classify")


def _roberta(folder: Path) -> None:
    """Positions begin after that of padding: of 34 rows of the table 32 are used."""
    config = transformers.RobertaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=96,
        max_position_embeddings=34, pad_token_id=1, num_labels=2,
    )  # fmt: skip
    transformers.RobertaForSequenceClassification(config).save_pretrained(folder / "roberta")
    tokenizer = texts.bert_tokenizer()
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(folder / "roberta")
    texts.write(folder / "rows.jsonl", [{"text": "a" * 100, "label": "x"}, {"text": "b", "label": "y"}])
    data = {"train": str(folder / "rows.jsonl"), "max_length": 34}
    _recipe(folder, "roberta", task="classify", data=data)


def _t5(folder: Path) -> None:
    """The tokenizer of T5 says 512 tokens, which the model does not need."""
    t5().save_pretrained(folder / "t5")
    texts.tokenizer().save_pretrained(folder / "t5")
    texts.write(folder / "rows.jsonl", [{"prompt": "a" * 100, "completion": "b"}] * 4)
    _recipe(folder, "t5", task="seq2seq", data={"train": str(folder / "rows.jsonl"), "max_length": 128})


def _plan_uncut(folder: Path) -> None:
    assert load_input_spec(str(folder / "t5")).max_length > 2**20
    assert plan(folder / "recipe.yaml").data.cut == 0


# Labels that were misspelt


def _labeled(*labels: object) -> Act:
    return _rows(*({"text": f"text {number}", "label": label} for number, label in enumerate(labels)))


def _check_labels(*expected: str) -> Act:
    def check(folder: Path) -> None:
        files = [folder / "prepared" / name for name in ("train.jsonl", "validation.jsonl")]
        lines = [line for file in files if file.exists() for line in file.read_text("utf-8").splitlines()]
        assert {json.loads(line)["label"] for line in lines} == set(expected)

    return check


def _arguments(name: str, section: dict[str, Any], says: str, **fields: Any) -> Fault:
    def make(folder: Path) -> None:
        texts.write(folder / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
        _recipe(folder, "base", train={"max_steps": 1, **section}, **fields)

    return _row(name, make, lambda folder: load_recipe(folder / "recipe.yaml"), says, error=RecipeError, command=PLAN)


def _row(
    name: str,
    make: Act,
    act: Act,
    says: str = "",
    *,
    error: type[LoraKitError] | None = None,
    command: tuple[str, ...] = (),
    check: Act | None = None,
) -> Fault:
    writes = error is None and check is not None
    return Fault(name=name, make=make, act=act, says=says, error=error, command=command, check=check, writes=writes)


LABELS: tuple[Fault, ...] = (
    _row(
        "a head whose labels are not in the order of the alphabet",
        _sentiment("positive", "negative"),
        _evaluate,
        command=("eval", "rows.jsonl", "--base", "sentiment", "--out", "answers.jsonl", "--replace"),
        check=_check_answers,
    ),
    _row(
        "a head that knows other labels",
        _sentiment("ham", "spam"),
        _plan_with_other_labels,
        command=(*PLAN, "--json"),
    ),
    _row(
        "two texts, and rows of different weight",
        _rows(
            {"text": "a", "text_pair": "b", "label": "x"}, {"text": "c", "text_pair": "d", "label": "y", "weight": 2}
        ),
        _read_pairs,
        command=PREPARE[:4],
    ),
    _row("numbers with a fraction in a table", _csv("text,label\na,1\nb,2.5\n"), _read_numbers),
    _row(
        "30 numbers, each of one row",
        _labeled(*(7 * number for number in range(30))),
        _prepare(),
        "30 different numbers as labels, which looks like a regression",
        error=DataError,
        command=PREPARE,
    ),
    _row(
        "answers that are wanted and others that are not",
        _rows({"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "c", "label": False}),
        _read_preferences,
    ),
    _row(
        "a weight that the layout does not read",
        _rows({"prompt": "a", "completion": "b", "weight": 2}),
        _prepare(),
        "does not read weight",
        error=DataError,
        command=PREPARE,
    ),
    _row(
        "earlier turns in a column of their own",
        _rows({"instruction": "a", "output": "b", "history": [["c", "d"]]}),
        _prepare(),
        "history",
        error=DataError,
        command=PREPARE,
    ),
    _row(
        "a system message in a column of its own",
        _rows({"instruction": "a", "output": "b", "system": "be kind"}),
        _prepare(),
        "system",
        error=DataError,
        command=PREPARE,
    ),
    _row("a token without an embedding", _pad_outside, _plan, "'<new>'", error=BaseModelError, command=PLAN),
    _row("more tokens than there are positions", _roberta, _plan, "32 tokens", error=RecipeError, command=PLAN),
    _row("a length that only the tokenizer has", _t5, _plan_uncut),
    _row(
        "two letters of a label in the wrong order",
        _labeled(*["refund"] * 30, *["card"] * 30, "refnud"),
        _prepare(relabel="auto"),
        command=(*PREPARE, "--relabel", "auto"),
        check=_check_labels("refund", "card"),
    ),
    _row(
        "labels that differ in case and blanks",
        _labeled(*["refund"] * 4, "Refund", "refund ", *["card"] * 4),
        _prepare(relabel="auto"),
        command=(*PREPARE, "--relabel", "auto"),
        check=_check_labels("refund", "card"),
    ),
    _row(
        "a label to rename that no row has",
        _labeled("a", "b", "a", "b"),
        _prepare(relabel={"c": "a"}),
        "no label 'c'",
        error=DataError,
        command=(*PREPARE, "--relabel", "c=a"),
    ),
)
ARGUMENTS: tuple[Fault, ...] = (
    _arguments("a kind of tokens that nobody counts", {"include_num_input_tokens_seen": "bogus"}, "must be one of all"),
    _arguments(
        "the worst adapter kept", {"load_best_model_at_end": True, "greater_is_better": True}, "a lower loss is better"
    ),
    _arguments("evaluation in another dtype", {"bf16_full_eval": True}, "in the dtype of the training"),
    _arguments(
        "an end of the learning rate above its beginning",
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 0.5}},
        "must be smaller",
    ),
    _arguments("an argument that the optimizer has not", {"optim": "adamw_torch", "optim_args": "bogus=1"}, "bogus"),
)
