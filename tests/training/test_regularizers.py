"""Regularizers and schedules that recipes name do what they say, and are resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_kit.adapter.adapter import Adapter
from lora_kit.errors import RecipeError
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.train import train
from tests.support.interrupted import die_at, killed, long_recipe, results, unbroken
from tests.support.long_runs import take_few
from tests.support.training import At, base_of, recipe_of, weights_of

NOISE = {"neftune_noise_alpha": 5.0}
WSD = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 2, "lr_scheduler_kwargs": {"num_decay_steps": 3}}
BY_LAYER = {"learning_rates": {"layers\\.0\\..*": 0.0, "layers\\..*\\.v_proj": 3e-3}}


# NEFTune


class Embeddings:
    """Keeps what the embedding gives in training and in evaluation."""

    def __init__(self, model: Any) -> None:
        self.noisy = self.missed = self.clean = 0
        self.weight = model.get_input_embeddings().weight
        model.model.layers[0].register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, module: Any, args: Any, kwargs: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        is_a_row = (states[0, 0] == self.weight).all(dim=1).any()
        if module.training:
            self.noisy += not is_a_row
            self.missed += bool(is_a_row)
        else:
            self.clean += bool(is_a_row)


def test_noise_is_on_the_embeddings_in_every_step_and_in_no_evaluation(tmp_path: Path) -> None:
    base = base_of()
    seen = Embeddings(base.model)
    report = train(recipe_of(tmp_path, steps=3, train=NOISE), base=base)
    assert seen.noisy >= 3
    assert seen.missed == 0
    assert seen.clean >= 2  # before and after
    plain = train(recipe_of(tmp_path, steps=3, out=str(tmp_path / "plain")), base=base_of())
    assert weights_of(report) != weights_of(plain)
    assert report.before is not None
    assert plain.before is not None
    assert report.before.loss == plain.before.loss


def test_a_training_that_failed_leaves_no_noise(tmp_path: Path) -> None:
    base = base_of()
    embedding = base.model.get_input_embeddings()

    def fail(_: Any) -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError):
        train(recipe_of(tmp_path, train=NOISE), base=base, callbacks=[At(1, fail)])
    assert not embedding._forward_hooks
    assert not hasattr(embedding, "neftune_noise_alpha")


@pytest.mark.parametrize("section", take_few([NOISE, WSD, BY_LAYER], NOISE), ids=["neftune", "wsd", "rates"])
@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_the_same_bytes(section: dict[str, Any], tmp_path: Path) -> None:
    recipe = long_recipe(tmp_path, train=section)
    expected = unbroken(recipe)
    killed(recipe, die_at(5))
    assert train(recipe, base=base_of()).resumed == 4
    assert results(Path(recipe["out"])) == expected


# Rates by module, and a schedule


def test_each_module_has_the_rate_of_the_first_pattern_that_matches(tmp_path: Path) -> None:
    report = train(recipe_of(tmp_path, steps=2, train={**BY_LAYER, "weight_decay": 0.0}), base=base_of())
    sizes = {key: float(tensor.abs().max()) for key, tensor in Adapter.load(report.out).tensors.items() if "_B" in key}
    assert not [key for key, size in sizes.items() if "layers.0." in key and size > 0]
    upper = {
        name: max(size for key, size in sizes.items() if "layers.1." in key and name in key)
        for name in ("v_proj", "q_proj")
    }
    assert 0 < upper["v_proj"] < upper["q_proj"]  # 3e-3 instead of 1e-2


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train.learning_rates: 'lm_head' matches nothing that is trained"):
        train(recipe_of(tmp_path, train={"learning_rates": {"lm_head": 1e-3}}), base=base_of())
    least = {"base": "kit-base", "data": "a", "out": "x"}
    for section in ({"learning_rates": {"(": 1.0}}, {"learning_rates": {"q": -1.0}}, {"neftune_noise_alpha": 0}):
        with pytest.raises(RecipeError, match=r"train\.(learning_rates|neftune_noise_alpha)"):
            load_recipe({**least, "train": section})


def test_a_schedule_warms_up_stays_and_decays(tmp_path: Path) -> None:
    report = train(recipe_of(tmp_path, steps=8, train={**WSD, "logging_steps": 1}), base=base_of())
    rates = [entry["learning_rate"] for entry in report.history if "learning_rate" in entry]
    assert rates[0] < rates[1] <= rates[2]
    assert rates[2] == rates[3] == rates[4] == 1e-2
    assert rates[-1] < rates[-2] < rates[-3] <= 1e-2
