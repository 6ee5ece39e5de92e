"""Recipes of any bytes: a value or one typed error of one short line, in bounded time, before any work."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_kit.errors import LoraKitError, RecipeError, StorageError
from lora_kit.io.atomic_write import write_folder
from lora_kit.training.plan.plan import plan
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.train import train

GOOD: dict[str, Any] = {"base": "kit-base", "data": "rows.jsonl", "out": "adapters/x"}
HEAD = "base: kit-base\ndata: rows.jsonl\n"
LEVELS = "".join(
    f"{'abcdefgh'[i + 1]}: &{'abcdefgh'[i + 1]} [{', '.join(['*' + 'abcdefgh'[i]] * 9)}]\n" for i in range(7)
)
BOMB = f"a: &a [{', '.join('x' * 9)}]\n{LEVELS}"


def rejected(load: Callable[[], object]) -> str:
    """What is said of a recipe: one line, within bounded time."""
    begin = time.process_time()
    with pytest.raises(RecipeError) as caught:
        load()
    message = str(caught.value)
    assert time.process_time() - begin < 20
    assert len(message) <= 500
    assert message.isprintable()
    return message


TEXTS = {
    "an alias bomb": (BOMB + HEAD + "out: *h\n", "more than 10,000 values"),
    "an alias bomb as the base": (BOMB + "base: *h\ndata: x\nout: x", "more than 10,000 values"),
    "an alias bomb as a key": (BOMB + HEAD + "? *h\n: x\n", "the key None in line"),
    "an alias of itself": (HEAD + "out: &a [*a]", "nested more than"),
    "a tag of a truth value": (HEAD + "out: !!bool maybe", "a tag"),
    "a tag of a number": (HEAD + "out: !!int ''", "a tag"),
    "a tag of a date": (HEAD + "out: !!timestamp x", "a tag"),
    "a tag of an object": (HEAD + "out: !!python/object/apply:os.system [ls]", "a tag"),
    "a hexadecimal number without end": (HEAD + "out: 0x" + "f" * 5_000, "digits"),
    "a number of no digits": (HEAD + "out: 0b_", "cannot be read"),
    "a NUL": (HEAD + 'out: "a\\0b"', "out has a NUL in it"),
    "a surrogate": (HEAD + 'out: "\\ud800"', "surrogate"),
    "brackets without end": (HEAD + "out: " + "[" * 3_000, "nested more than"),
    "values without end": (HEAD + "out: [" + "1," * 20_000 + "]", "more than 10,000 values"),
    "a key without end": (HEAD + "out: x\n? " + "k" * 100_000 + "\n: 1", "a key has 100,000 characters"),
    "a long key": (HEAD + "out: x\n? " + "k" * 60_000 + "\n: 1", "unknown key"),
    "a value without end": (HEAD + "out: x\nlora: {r: '" + "v" * 100_000 + "'}", "lora.r has 100,000 characters"),
    "a long value": (HEAD + "out: x\nlora: {r: '" + "v" * 60_000 + "'}", "lora.r must be"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_recipe_that_is_an_attack_is_one_short_error(tmp_path: Path, name: str) -> None:
    text, message = TEXTS[name]
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    assert message in rejected(lambda: load_recipe(file))


def test_aliases_that_are_few_and_times_of_day_stay_what_they_are(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("base: &b kit-base\ndata: x\nout: 12:30\nlora: {base_model_name_or_path: *b, r: 0x10}\n")
    recipe = load_recipe(file)
    assert (recipe.out, recipe.lora.base_model_name_or_path, recipe.lora.r) == ("12:30", "kit-base", 16)


NUMBERS: list[tuple[str, Any]] = [
    ("max_steps", 1e20),
    ("adam_beta1", 2),
    ("per_device_train_batch_size", 10**20),
    ("gradient_accumulation_steps", 10**15),
    ("dataloader_num_workers", 1_000_000),
    ("num_train_epochs", 1e300),
    ("logging_steps", 10**30),
    ("save_total_limit", -1),
]


@pytest.mark.parametrize(("key", "value"), NUMBERS)
def test_a_number_that_cannot_work_is_found_before_any_work(key: str, value: Any) -> None:
    recipe = {**GOOD, "train": {key: value}}
    for run in (load_recipe, train, plan):
        assert "train." in rejected(lambda run=run: run(recipe))  # type: ignore[misc]


def test_an_output_that_no_file_system_takes_is_found_before_any_work(tmp_path: Path) -> None:
    for out in ("n" * 300, f"{'n' * 300}/x", "ä" * 120, "a/" * 3_000 + "x"):
        for run in (train, plan):
            assert "out " in rejected(lambda run=run, out=out: run({**GOOD, "out": out}))  # type: ignore[misc]
    with pytest.raises(StorageError, match="has a name of 300 bytes"):
        write_folder(tmp_path / ("n" * 300), {})
    write_folder(tmp_path / ("n" * 220), {"x": b""})


class Endless:
    """A value whose text is long."""

    def __repr__(self) -> str:
        return "z" * 10**6


OBJECTS: dict[str, Any] = {
    "another object": {**GOOD, "train": {"seed": Endless()}},
    "an object as the base": {**GOOD, "base": Endless()},
    "a key that is a number": {**GOOD, 5: 1},
    "an unknown key without end": {**GOOD, "k" * 100_000: 1},
    "a mapping as the base": {**GOOD, "base": {"a": [1] * 1_000}},
    "a mapping in itself": (lambda value: value.update(train=value) or value)(dict(GOOD)),
    "a number": 5,
    "bytes": b"x",
    "a path with a NUL": "a\0.yaml",
    "a path without end": "a" * 5_000 + ".yaml",
}


@pytest.mark.parametrize("name", OBJECTS)
def test_any_object_as_a_recipe_is_one_short_error(name: str) -> None:
    rejected(lambda: load_recipe(OBJECTS[name]))


@pytest.mark.parametrize("key", ["lora." + "r" * 100_000, "r" * 100_000, "x" * 9_000 + ".r", 5])
def test_any_override_is_one_short_error(key: Any) -> None:
    rejected(lambda: load_recipe(GOOD, overrides={key: 1}))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet="&*!|>-?:,[]{}#%@`'\"\\ \n\t0xae+._~<=\0\x85\ud800é", max_size=60), st.booleans())
def test_any_text_is_a_recipe_or_a_typed_error(tmp_path: Path, text: str, within: bool) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes((HEAD + f"out: {text}" if within else text).encode("utf-8", "surrogatepass"))
    message = ""
    try:
        load_recipe(file)
    except LoraKitError as error:
        message = str(error)
    assert len(message) <= 500
