"""A recipe that starts from an adapter: its values, its config, and what does not fit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kit.errors import BaseMismatchError, LoraKitError, RecipeError
from lora_kit.models.loading import Base
from lora_kit.training.plan.plan import plan
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.train import train
from tests.support import texts, tiny
from tests.support.interrupted import die_at, killed, results, unbroken
from tests.support.long_runs import take_few
from tests.support.preferences import losses_of, preference_recipe
from tests.support.training import LABELED, base_of, recipe_of, weights_of

STILL = {"learning_rate": 0.0, "weight_decay": 0.0}
"""A training that changes nothing: what it saves is what it started from."""


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """An adapter that was trained for a few steps."""
    folder = tmp_path / "first"
    folder.mkdir()
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    return train(recipe_of(folder, lora=lora), base=base_of()).out


def follow(folder: Path, start: Path, **changes: Any) -> dict[str, Any]:
    return recipe_of(folder, **{"from": str(start), **changes})


def test_the_first_step_has_the_values_and_the_config_of_the_adapter(first: Path, tmp_path: Path) -> None:
    report = train(follow(tmp_path, first, train=STILL), base=base_of())
    assert weights_of(report) == (first / "adapter_model.safetensors").read_bytes()
    assert report.recipe.lora.r == 4
    assert report.recipe.lora.target_modules == ("q_proj", "v_proj")
    assert report.before is not None
    assert report.before.loss < train(recipe_of(tmp_path, out=str(tmp_path / "new")), base=base_of()).before.loss  # type: ignore[union-attr]
    assert load_recipe(report.recipe.to_dict()) == report.recipe


@pytest.mark.slow
def test_a_run_that_starts_from_an_adapter_resumes_to_the_same_bytes(first: Path, tmp_path: Path) -> None:
    recipe = follow(tmp_path, first, steps=6, train={"save_steps": 2})
    expected = unbroken(recipe)
    killed(recipe, die_at(3))
    assert train(recipe, base=base_of()).resumed == 2
    assert results(Path(recipe["out"])) == expected


def test_the_reference_of_preferences_is_the_adapter_at_the_start(first: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    recipe = preference_recipe(tmp_path, "dpo", **{"from": str(first), "lora": {}})
    report = train(recipe, base=base_of())
    losses = losses_of(report.history)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0]
    assert report.before is not None
    assert report.before.metrics()["rewards/margins"] == 0


@pytest.mark.parametrize(
    "lora",
    take_few(
        [{"r": 8}, {"r": 2}, {"lora_alpha": 3}, {"target_modules": ["k_proj"]}],
        {"r": 8},
        {"target_modules": ["k_proj"]},
    ),
)
def test_another_config_is_refused(lora: dict[str, Any], first: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"other values of lora\.\w+ than the recipe"):
        train(follow(tmp_path, first, lora=lora), base=base_of())


def test_what_does_not_fit_is_refused_and_nothing_is_written(first: Path, tmp_path: Path) -> None:
    other: Any = tiny.llama(seed=7)
    with pytest.raises(BaseMismatchError):
        train(follow(tmp_path, first), base=Base(model=other, tokenizer=texts.tokenizer(), name="tiny"))
    assert torch.equal(
        other.model.layers[0].self_attn.q_proj.weight, tiny.llama(seed=7).model.layers[0].self_attn.q_proj.weight
    )
    with pytest.raises(RecipeError, match="from is for the methods lora and features"):
        train(follow(tmp_path, first, method="full"), base=base_of())
    with pytest.raises(LoraKitError, match="nothing-here"):
        train(follow(tmp_path, tmp_path / "nothing-here"), base=base_of())
    assert not (tmp_path / "out").exists()


def test_other_labels_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "first"
    folder.mkdir()
    base = base_of("bert", labels=2)
    start = train(recipe_of(folder, rows=LABELED, task="classify", method="features"), base=base).out
    rows = [{**row, "label": f"not {row['label']}"} for row in LABELED]
    recipe = follow(tmp_path, start, rows=rows, task="classify", method="features")
    with pytest.raises(RecipeError, match=r"from: the adapter's labels are no, yes, those of the rows not no, not yes"):
        train(recipe, base=base_of("bert", labels=2))


def test_a_plan_knows_where_it_starts(first: Path, tmp_path: Path) -> None:
    found = plan(follow(tmp_path, first), base=base_of())
    assert found.recipe.lora.r == 4
    assert found.recipe.to_dict()["from"] == str(first)
