"""Flags of a recipe: a misspelled one is an error before torch is imported, and none that a recipe takes is one."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kit.cli.recipe_flags import check_recipe_keys
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import RecipeError
from lora_kit.training.recipe.recipe import DataSpec, Recipe
from lora_kit.training.recipe.train_keys import OWN_FIELDS
from lora_kit.training.recipe.training_arguments import get_training_argument_types

COMMAND = """
import sys
from lora_kit.cli.main import main
code = main(sys.argv[1:])
print(code, *({"torch", "transformers"} & {*sys.modules}))
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("base: kit-base\ndata: rows.jsonl\nout: out\n", "utf-8")
    return path


@pytest.mark.parametrize(
    ("flags", "meant"),
    [(["train", "--lora.rr", "4"], "--lora.r?"), (["sweep", "--over", "lora.rank=4,8"], "--over lora.r?")],
)
def test_a_misspelled_flag_costs_no_import_of_torch(recipe: Path, flags: list[str], meant: str) -> None:
    verb, *rest = flags
    command = [sys.executable, "-c", COMMAND, verb, str(recipe), *rest]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.stdout.strip() == "2"
    assert f"did you mean {meant}" in ended.stderr


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("trian.learning_rate", "--train.learning_rate"),
        ("train.learningrate", "--train.learning_rate"),
        ("lr", "--train.learning_rate"),
        ("data.trian", "--data.train"),
        ("metod", "--method"),
    ],
)
def test_the_nearest_flag_is_named(recipe: Path, key: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=f"did you mean {meant}\\?"):
        check_recipe_keys([key], [recipe])


def test_every_key_of_a_recipe_is_known(recipe: Path) -> None:
    names = [field.name.replace("start_from", "from") for field in dataclasses.fields(Recipe)]
    for section, config in (("lora", LoraConfig), ("data", DataSpec)):
        names += [f"{section}.{field.name}" for field in dataclasses.fields(config)]
    names += [f"train.{name}" for name in (*get_training_argument_types(), *OWN_FIELDS)]
    check_recipe_keys(names, [recipe])


def test_keys_of_other_libraries_are_checked_with_the_recipe(recipe: Path) -> None:
    check_recipe_keys(["peft.alpha"], [recipe])
    with pytest.raises(RecipeError, match=r"train\.beta"):
        check_recipe_keys(["train.beta"], [recipe])
    check_recipe_keys(["train.beta", "objective"], [recipe])
    recipe.write_text("objective: dpo\n", "utf-8")
    check_recipe_keys(["train.beta"], [recipe])
    check_recipe_keys(["train.beta"], [recipe.with_name("missing.yaml")])
