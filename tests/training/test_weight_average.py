"""`train.ema_decay`: the result is the recurrence over the weights of every step, and so is what is evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from lora_kit.adapter.adapter import Adapter
from lora_kit.errors import RecipeError
from lora_kit.training.keep import keep
from lora_kit.training.loop.resumable import AVERAGE, WEIGHTS
from lora_kit.training.loop.weight_average import WeightAverage
from lora_kit.training.loop.weight_files import load_tensors
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.train import train
from tests.support.interrupted import die_at, killed, long_recipe, results, run_of, unbroken
from tests.support.training import base_of, recipe_of

EMA = {"ema_decay": 0.7}


class Recurrence(transformers.TrainerCallback):
    """Computes e = d * e + (1 - d) * w of all trained tensors by itself, and keeps the last w."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average = self.read(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = self.read(kwargs["model"])
        for name, value in self.last.items():
            self.average[name] = self.decay * self.average[name] + (1 - self.decay) * value

    def read(self, model: Any) -> dict[str, Tensor]:
        named = model.named_parameters()
        return {name: value.detach().double().clone() for name, value in named if value.requires_grad}


def shapes(tensors: Any) -> list[Tensor]:
    return sorted((tensor.double() for tensor in tensors), key=lambda tensor: (tensor.shape, float(tensor.sum())))


def test_the_result_is_the_recurrence_and_not_the_last_weights(tmp_path: Path) -> None:
    seen = Recurrence(0.7)
    report = train(recipe_of(tmp_path, steps=5, train=EMA), base=base_of(), callbacks=[seen])
    saved = shapes(load_file(report.out / "adapter_model.safetensors").values())
    for one, other in zip(saved, shapes(seen.average.values()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    last = shapes(seen.last.values())
    assert any((one - other).abs().max() > 1e-3 for one, other in zip(saved, last, strict=True))


def test_an_average_changes_no_step(tmp_path: Path) -> None:
    seen, plain = Recurrence(0.7), Recurrence(0.7)
    section = {"eval_strategy": "steps", "eval_steps": 1}
    train(recipe_of(tmp_path, steps=4, train={**EMA, **section}), base=base_of(), callbacks=[seen])
    train(recipe_of(tmp_path, steps=4, out=str(tmp_path / "plain")), base=base_of(), callbacks=[plain])
    assert all(torch.equal(seen.last[name], plain.last[name]) for name in plain.last)


def test_what_is_evaluated_is_the_average(tmp_path: Path) -> None:
    section = {**EMA, "eval_strategy": "steps", "eval_steps": 3}
    during = train(recipe_of(tmp_path, steps=3, train=section), base=base_of())
    after = train(recipe_of(tmp_path, steps=3, train=EMA, out=str(tmp_path / "after")), base=base_of())
    plain = train(recipe_of(tmp_path, steps=3, out=str(tmp_path / "plain")), base=base_of())
    assert during.after is not None
    assert after.after is not None
    assert plain.after is not None
    assert during.after.loss == after.after.loss != plain.after.loss


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.3}},
        {"method": "features", "lora": {}},
        {"lora": {"init_lora_weights": "pissa"}},
    ],
    ids=["lora", "best", "features", "pissa"],
)
@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_the_same_bytes(tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = long_recipe(tmp_path, **{**changes, "train": {**changes.get("train", {}), **EMA}})
    expected = unbroken(recipe)
    killed(recipe, die_at(5))
    report = train(recipe, base=base_of())
    assert report.resumed == 4
    assert results(report.out) == expected


def test_a_checkpoint_is_the_average_and_holds_the_weights_beside_it(tmp_path: Path) -> None:
    recipe = long_recipe(tmp_path, train=EMA)
    killed(recipe, die_at(5))
    folder = run_of(Path(recipe["out"])) / "checkpoint-4"
    weights, average = load_tensors(folder / WEIGHTS), load_tensors(folder / AVERAGE)
    assert load_file(folder / AVERAGE) == {}  # the adapter's own tensors
    assert weights.keys() == average.keys()
    assert not all(torch.equal(weights[name], average[name]) for name in weights)
    adapter = Adapter.load(folder)
    for one, other in zip(shapes(adapter.tensors.values()), shapes(average.values()), strict=True):
        assert torch.equal(one, other)
    assert Adapter.load(keep(recipe["out"]).out) == adapter


def test_an_average_of_low_precision_does_not_stand_still() -> None:
    weight = torch.zeros(1, dtype=torch.bfloat16)
    average = WeightAverage(0.999, {"w": weight})
    for _ in range(1_000):
        average.update({"w": torch.ones(1, dtype=torch.bfloat16)})
    assert average.tensors["w"].item() == pytest.approx(1 - 0.999**1_000, rel=1e-4)


@pytest.mark.parametrize("value", [0, 1, -0.5, 1.5])
def test_a_decay_of_no_sense_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(RecipeError, match=r"train.ema_decay must be above 0 and below 1"):
        load_recipe(recipe_of(tmp_path, train={"ema_decay": value}))
