"""Several files as one: weights, the seed, and which file a fault is in."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_kit as lk
from lora_kit.data.batches import concatenate_samples, join_samples
from lora_kit.data.encode import encode
from lora_kit.data.label_problem import resolve_problem
from lora_kit.data.mixture import DataFile, choose_rows, describe_source, read_source
from lora_kit.data.rows import Rows
from lora_kit.errors import DataError, RecipeError
from lora_kit.training.job.job import Job
from lora_kit.training.job.recipe_rows import read_recipe_rows
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.recipe.portable_recipe import make_recipe_portable
from tests.support import texts


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """Ten rows a0 … a9, and four rows b0 … b3."""
    names = {"a": 10, "b": 4}
    written = [
        texts.write(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}{n}", "completion": "x"} for n in range(count)])
        for name, count in names.items()
    ]
    return str(written[0]), str(written[1])


def mix(files: tuple[str, str], one: float, two: float, *, seed: int = 0) -> Rows:
    return read_source((DataFile(files[0], one), DataFile(files[1], two)), split="train", seed=seed)


def counts(rows: Rows) -> Counter[str]:
    return Counter(value[0] for value in rows.values)


def test_a_weight_is_how_many_times_the_rows_are_taken(files: tuple[str, str]) -> None:
    found = counts(mix(files, 0.5, 2.25))
    assert sum(count for name, count in found.items() if name.startswith("a")) == 5
    assert max(count for name, count in found.items() if name.startswith("a")) == 1
    assert sorted(count for name, count in found.items() if name.startswith("b")) == [2, 2, 2, 3]
    assert counts(mix(files, 1, 1)) == Counter([f"a{n}" for n in range(10)] + [f"b{n}" for n in range(4)])
    assert sum(counts(mix(files, 0.01, 1)).values()) == 5


def test_the_seed_chooses_the_rows_and_the_name_of_a_file_does_not(files: tuple[str, str], tmp_path: Path) -> None:
    assert mix(files, 0.5, 1, seed=3).values == mix(files, 0.5, 1, seed=3).values
    assert len({mix(files, 0.5, 1, seed=seed).values for seed in range(5)}) > 1
    other = Path(files[0]).rename(tmp_path / "renamed.jsonl")
    renamed = (str(other), files[1])
    Path(files[0]).write_bytes(other.read_bytes())
    assert mix(renamed, 0.5, 1).values == mix(files, 0.5, 1).values
    assert choose_rows(100, 0.3, seed=0, place=0) != choose_rows(100, 0.3, seed=0, place=1)


def test_a_fault_names_the_file_and_the_line_once(files: tuple[str, str]) -> None:
    texts.write(Path(files[1]), [{"prompt": "p", "completion": "short"}, {"prompt": "p", "completion": "y" * 99}])
    rows = mix(files, 1, 3)
    with pytest.raises(DataError) as caught:
        encode(rows, texts.tokenizer(), max_length=32)
    assert str(caught.value).count("b.jsonl:2: the completion has") == 1
    assert "a.jsonl" not in str(caught.value)


def test_samples_of_several_files_are_those_of_each(files: tuple[str, str]) -> None:
    rows = mix(files, 1, 2)
    joined = encode(rows, texts.tokenizer(), max_length=32)
    each = [encode(part, texts.tokenizer(), max_length=32) for part in rows.parts]
    samples = [sample for part in each for sample in part]
    assert len(joined) == len(samples) == 18
    for one, other in zip(joined, samples, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("input_ids", "labels"))


def test_rows_without_a_weight_count_once_beside_rows_with_one() -> None:
    plain = join_samples([([1, 2], [1, 2])], kind="token")
    weighted = join_samples([([3], [3])], kind="token", weights=[0.5])
    assert concatenate_samples([plain, plain]).weights is None
    joined = concatenate_samples([plain, weighted]).weights
    assert joined is not None
    assert joined.tolist() == [1.0, 0.5]


def test_texts_without_types_of_tokens_are_of_type_0_beside_pairs() -> None:
    single = join_samples([([1, 5, 2], [0]), ([1, 6, 6, 2], [1])], kind="label")
    pairs = join_samples([([1, 5, 2, 7, 2], [0])], kind="label", types=[[0, 0, 0, 1, 1]])
    for parts in ([single, pairs], [pairs, single]):
        for sample in concatenate_samples(parts):
            length = len(sample["input_ids"])
            assert sample["token_type_ids"].tolist() == ([0, 0, 0, 1, 1] if length == 5 else [0] * length)
    assert concatenate_samples([single, single]).types is None


def test_whole_numbers_and_fractions_are_numbers_and_pairs_are_no_texts(tmp_path: Path) -> None:
    whole = texts.write(tmp_path / "whole.jsonl", [{"text": "a", "label": 2}])
    fractions = texts.write(tmp_path / "fractions.jsonl", [{"text": "b", "label": 0.5}])
    for order in ((whole, fractions), (fractions, whole)):
        rows = read_source(tuple(DataFile(str(path)) for path in order), split="train", seed=0)
        assert resolve_problem(rows, None) == "regression"
    pairs = texts.write(tmp_path / "pairs.jsonl", [{"text": "a", "text_pair": "b", "label": 2}])
    for order in ((whole, pairs), (pairs, whole)):
        with pytest.raises(DataError, match=r"pairs.jsonl has pairs of texts, and .*whole.jsonl has single texts"):
            read_source(tuple(DataFile(str(path)) for path in order), split="train", seed=0)


def test_files_of_two_formats_or_two_kinds_of_labels_are_refused(tmp_path: Path) -> None:
    words = texts.write(tmp_path / "words.jsonl", [{"text": "a", "label": "x"}])
    numbers = texts.write(tmp_path / "numbers.jsonl", [{"text": "a", "label": 1}])
    plain = texts.write(tmp_path / "plain.jsonl", [{"text": "a"}])
    for other, message in (
        (numbers, r"labels of .*words.* are str, .*numbers.* are int"),
        (plain, "format label.*format text"),
    ):
        with pytest.raises(DataError, match=message):
            read_source((DataFile(str(words)), DataFile(str(other))), split="train", seed=0)


# Recipes


def recipe_fields(data: object) -> dict[str, Any]:
    return {"base": "kit-base", "data": data, "out": "adapters/x"}


def test_a_recipe_names_files_with_weights_and_comes_back_from_yaml(tmp_path: Path) -> None:
    data = {"train": ["a.jsonl", {"path": "b.jsonl", "weight": "0.5"}], "validation": ["v.jsonl", "w.jsonl"]}
    recipe = load_recipe(recipe_fields(data))
    assert recipe.data.train == (DataFile("a.jsonl"), DataFile("b.jsonl", 0.5))
    assert describe_source(recipe.data.train) == "a.jsonl, b.jsonl (0.5 times)"
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(file) == recipe
    flag = load_recipe(recipe_fields("z.jsonl"), overrides={"data.train": "[a.jsonl, {path: b.jsonl, weight: 0.5}]"})
    assert flag.data.train == recipe.data.train
    assert load_recipe(recipe_fields(["a.jsonl", "b.jsonl"])).data.train == (DataFile("a.jsonl"), DataFile("b.jsonl"))


def test_files_of_one_name_outside_the_project_stay_two_files() -> None:
    recipe = make_recipe_portable(
        load_recipe(recipe_fields(["/far/one/train.jsonl", "/far/two/train.jsonl", "in.jsonl"]))
    )
    assert recipe.data.train == (DataFile("train.jsonl"), DataFile("train.jsonl"), DataFile("in.jsonl"))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], r"data\.train must not be empty"),
        ([""], r"data\.train must not be empty"),
        ([{"path": "a", "weight": 0}], "must be above 0 and at most 1,000; 0 was given"),
        ([{"path": "a", "weight": -1}], "must be above 0"),
        ([{"path": "a", "weight": 1e9}], "at most 1,000"),
        ([{"path": "a", "weight": "much"}], r"data\.train\[0\]\.weight must be a finite number"),
        ([{"path": "a", "wieght": 2}], r"unknown key data\.train\[0\]\.wieght .*weight"),
        ([{"weight": 2}], r"data\.train\[0\] must be a path or a mapping"),
        ([3], r"data\.train\[0\] must be a path"),
        (3, r"data\.train must be a path or a list"),
    ],
)  # fmt: skip
def test_a_list_of_files_that_is_wrong_is_refused(train: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_fields({"train": train}))


def test_every_row_is_validated_on_once() -> None:
    with pytest.raises(RecipeError, match=r"data\.validation: v has a weight"):
        load_recipe(recipe_fields({"train": "a", "validation": [{"path": "v", "weight": 2}]}))


def test_a_mixture_is_trained_on_and_its_weights_are_part_of_the_run(
    files: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lora_kit")

    def identity(one: float, two: float) -> object:
        train = [{"path": files[0], "weight": one}, {"path": files[1], "weight": two}]
        return Job.open(load_recipe(recipe_fields({"train": train, "max_length": 32}))).identity

    assert identity(1, 1) != identity(1, 2)
    train = [files[0], {"path": files[1], "weight": 0.5}]
    data = {"train": train, "validation": list(files), "max_length": 32}
    steps = {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no"}
    fields = {**recipe_fields(data), "train": steps, "out": str(tmp_path / "out"), "lora": {"r": 2}}
    report = lk.train(fields)
    assert report.steps == 2
    assert report.after is not None
    assert "b.jsonl (0.5 times): 12 samples" in caplog.text


def test_pairs_and_single_texts_are_not_trained_and_validated_together(tmp_path: Path) -> None:
    single = texts.write(tmp_path / "single.jsonl", [{"text": "a", "label": "x"}])
    pairs = texts.write(tmp_path / "pairs.jsonl", [{"text": "a", "text_pair": "b", "label": "x"}])
    for train, validation in ((single, pairs), (pairs, single)):
        data = {"train": str(train), "validation": str(validation)}
        recipe = load_recipe({"base": "b", "task": "classify", "data": data, "out": str(tmp_path / "out")})
        with pytest.raises(DataError, match=r"pairs.jsonl has pairs of texts, and .*single.jsonl has single texts"):
            read_recipe_rows(recipe)
