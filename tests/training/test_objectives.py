"""Preferences and rewards: TRL's losses from a recipe, with our checkpoints; the reference is the model itself."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kit.adapter.adapter import Adapter
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import BankError, DataError, RecipeError
from lora_kit.models.loading import Base
from lora_kit.sweeps.space import check_values, parse_space
from lora_kit.sweeps.sweep import sweep
from lora_kit.training.plan.plan import plan
from lora_kit.training.recipe import objectives
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.recipe.objectives import TRL_OBJECTIVES
from lora_kit.training.train import train
from tests.support import texts
from tests.support.interrupted import die_at, killed, results, run_of, unbroken
from tests.support.long_runs import take_few
from tests.support.preferences import (
    FEEDBACK,
    PREFERENCES,
    KeepStart,
    base_for,
    losses_of,
    preference_recipe,
    reward_base,
    rows_for,
)
from tests.support.training import PAIRS, base_of, recipe_of, same_state, state

trl = pytest.importorskip("trl", reason="TRL is not installed (pip install 'lora-kit[preferences]')")
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # about names that TRL uses
PREFERRING = [name for name, each in TRL_OBJECTIVES.items() if not each.generates]
EACH = pytest.mark.parametrize("objective", PREFERRING)
LEAST: dict[str, Any] = {"base": "kit-base", "data": "train.jsonl", "out": "adapters/x"}


@pytest.fixture(autouse=True)
def _no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")


# The same losses as TRL's own


def with_bos(base: Base) -> Base:
    """Return a base whose tokenizer puts a BOS before a text, as ORPO's trainer does for any that has one."""
    return dataclasses.replace(base, tokenizer=texts.tokenizer(bos="<s>"))


def train_with_trl(objective: str, recipe: dict[str, Any], start: Adapter, folder: Path) -> list[float]:
    """Train the same rows with TRL and PEFT alone, from the same adapter, and return the losses."""
    import datasets
    import peft

    base = with_bos(base_for(objective))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type=start.config.task_type)
    if objective == "reward":
        config.modules_to_save = ["score"]
    model = peft.get_peft_model(base.model, config)
    peft.set_peft_model_state_dict(model, dict(start.tensors))
    spec = TRL_OBJECTIVES[objective]
    config_class = objectives.load_config_class(objective)
    trainer_class = objectives.load_trl_class(objective, spec.config.replace("Config", "Trainer"))
    section = {key: value for key, value in recipe["train"].items() if key != "early_stopping_patience"}
    args = config_class(
        str(folder / "trl"), seed=0, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        save_strategy="no", disable_tqdm=True, **section,
    )  # fmt: skip
    data = datasets.Dataset.from_list(rows_for(objective))
    trainer = trainer_class(model, args=args, train_dataset=data, processing_class=base.tokenizer)
    trainer.train()
    return losses_of(trainer.state.log_history)


@EACH
def test_the_losses_are_those_of_trl_with_peft(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = KeepStart(monkeypatch)
    recipe = preference_recipe(tmp_path, objective, train={"gradient_accumulation_steps": 2})
    found = losses_of(train(recipe, base=with_bos(base_for(objective))).history)
    assert start.adapter is not None
    expected = train_with_trl(objective, recipe, start.adapter, tmp_path)
    assert len(found) == len(expected) == 6
    assert found == pytest.approx(expected, abs=1e-4)
    assert len(set(found)) > 3  # they move


# What is trained, and what is not


@EACH
def test_an_objective_changes_the_adapter_and_nothing_else(objective: str, tmp_path: Path) -> None:
    base = base_for(objective)
    base.model.config.attention_dropout = 0.0
    before, attributes, pad = state(base.model), set(vars(base.model)), base.model.config.pad_token_id
    dropout = torch.nn.Dropout(0.3)
    base.model.add_module("unused", dropout)
    report = train(preference_recipe(tmp_path, objective), base=base)
    assert same_state(base.model, before)
    assert (set(vars(base.model)), base.model.config.pad_token_id) == (attributes, pad)
    assert dropout.p == 0.3
    adapter = Adapter.load(report.out)
    assert any(tensor.abs().sum() > 0 for key, tensor in adapter.tensors.items() if "lora_B" in key)
    assert adapter.record["recipe"]["objective"] == objective


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_no_second_model_is_loaded_or_copied(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    from lora_kit.training.job import loops

    loops_built: list[Any] = []
    build = loops.build_preference_loop
    monkeypatch.setattr(
        loops, "build_preference_loop", lambda *a, **k: loops_built.append(build(*a, **k)) or loops_built[-1]
    )
    base = base_for(objective)
    models: list[str] = []
    monkeypatch.setattr(PreTrainedModel, "__init__", lambda self, *a, **k: models.append(type(self).__name__))
    train(preference_recipe(tmp_path, objective, steps=2), base=base)
    (loop,) = loops_built
    assert models == []
    assert not list(loop.ref_model.parameters())
    assert loop.ref_model.config is base.model.config


def test_preference_accuracy_rises_on_pairs_that_were_held_out(tmp_path: Path) -> None:
    words = ["cat", "dog", "sun", "sea", "map", "tea", "ink", "owl", "fox", "bee", "elk", "ant"]
    rows = [{"prompt": f"{word}: ", "chosen": "yes", "rejected": "no"} for word in words]
    recipe = preference_recipe(tmp_path, "dpo", rows=rows[:8], steps=20)
    recipe["data"]["validation"] = str(texts.write(tmp_path / "valid.jsonl", rows[8:]))
    report = train(recipe, base=base_of())
    assert report.before is not None
    assert report.after is not None
    assert report.before.metrics()["rewards/accuracies"] == 0  # every reward is 0
    assert report.after.metrics()["rewards/accuracies"] == 1
    assert report.after.loss < report.before.loss


# Evaluation


@pytest.mark.parametrize("objective", take_few(["dpo", "orpo", "reward"], "reward"))
def test_an_evaluation_does_not_depend_on_the_size_of_its_batches(objective: str, tmp_path: Path) -> None:
    found = []
    for size in (1, 2, 8):
        folder = tmp_path / str(size)
        folder.mkdir()
        recipe = preference_recipe(folder, objective, steps=2, train={"per_device_eval_batch_size": size})
        report = train(recipe, base=base_for(objective))
        assert report.after is not None
        found.append(report.after.metrics())
    assert list(found[0]) == ["loss", *TRL_OBJECTIVES[objective].metrics]
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-5) or objective == "orpo"  # its loss is a mean over tokens
        assert {k: v for k, v in other.items() if k != "loss"} == pytest.approx(
            {k: v for k, v in found[0].items() if k != "loss"}, abs=1e-5
        )


def test_the_best_adapter_by_a_metric_of_the_objective_is_kept(tmp_path: Path) -> None:
    section = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "rewards/margins",
        "early_stopping_patience": 2,
        "learning_rate": 0.5,
        "max_steps": 12,
    }
    report = train(preference_recipe(tmp_path, "dpo", train=section), base=base_of())
    margins = {entry["step"]: entry["eval_rewards/margins"] for entry in report.history if "eval_loss" in entry}
    assert margins[report.kept] == max(margins.values())
    assert report.after is not None
    assert report.after.metrics()["rewards/margins"] == margins[report.kept]


# Stopped and resumed


@pytest.mark.parametrize("objective", take_few(PREFERRING, "kto"))
@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_the_same_bytes(objective: str, tmp_path: Path) -> None:
    section = {"save_steps": 2, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    recipe = preference_recipe(tmp_path, objective, steps=7, train=section)
    expected = unbroken(recipe, base=lambda: base_for(objective))
    killed(recipe, die_at(5), base=lambda: base_for(objective))
    assert run_of(Path(recipe["out"])).is_dir()
    report = train(recipe, base=base_for(objective))
    assert report.resumed == 4
    assert results(Path(recipe["out"])) == expected


# Before any work


def test_a_plan_counts_and_measures_an_objective(tmp_path: Path) -> None:
    base = base_of()
    before = state(base.model)
    found = plan(preference_recipe(tmp_path, "dpo", train={"max_steps": -1, "num_train_epochs": 2}), base=base)
    assert (found.data.rows, found.data.samples, found.steps.steps) == (5, 5, 6)
    assert found.data.tokens == sum(
        2 * len(r["prompt"]) + len(r["chosen"]) + len(r["rejected"]) + 2 for r in PREFERENCES
    )
    assert found.measured.tokens > 0
    assert found.memory.activations > 0
    assert same_state(base.model, before)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"objective": "dop"}, r"objective 'dop' is not known \(did you mean 'dpo'"),
        ({"objective": "rloo"}, r"objective rloo is not supported: grpo learns from the same rows and rewards"),
        ({"objective": "dpo", "train": {"bta": 0.1}}, r"unknown key train.bta \(did you mean 'beta'"),
        (
            {"objective": "dpo", "train": {"loss_type": "sigmod"}},
            r"train.loss_type 'sigmod' .* \(did you mean 'sigmoid'",
        ),
        ({"objective": "dpo", "train": {"beta": 0}}, r"train.beta must be above 0"),
        ({"objective": "dpo", "train": {"max_length": 64}}, r"train.max_length cannot be set .*data.max_length"),
        ({"objective": "dpo", "train": {"label_smoothing_factor": 0.1}}, r"label_smoothing_factor cannot be set"),
        ({"objective": "dpo", "train": {"loss_weights": [1, 2]}}, r"loss_weights has 2 values, train.loss_type 1"),
        ({"objective": "dpo", "train": {"desirable_weight": 2}}, r"unknown key train.desirable_weight"),
        ({"train": {"beta": 0.1}}, r"unknown key train.beta"),
        ({"objective": "kto", "train": {"metric_for_best_model": "rewards/accuracies"}}, r"metric_for_best_model"),
        ({"objective": "dpo", "method": "full"}, r"method full does not go with objective dpo"),
        ({"objective": "orpo", "compile": True}, r"compile does not go with objective orpo"),
        ({"objective": "dpo", "data": {"train": "a", "packing": True}}, r"data.packing does not go with objective"),
        ({"objective": "dpo", "task": "classify"}, r"objective dpo is for task causal-lm; the task is classify"),
        ({"objective": "dpo", "lora": {"lora_dropout": 0.1}}, r"lora.lora_dropout is 0.1, and .* without dropout"),
    ],
)
def test_a_recipe_that_cannot_be_trained_is_refused_before_any_work(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({**LEAST, **recipe})


def test_a_recipe_of_an_objective_is_read_from_what_it_writes() -> None:
    recipe = load_recipe({**LEAST, "objective": "dpo", "train": {"loss_type": "ipo", "beta": 0.3}})
    assert recipe.train["loss_type"] == ["ipo"]
    assert recipe.train["learning_rate"] == 1e-5
    assert load_recipe(recipe.to_dict()) == recipe
    assert "objective" not in load_recipe(LEAST).to_dict()
    assert load_recipe({**LEAST, "objective": "reward"}).task == "classify"


def test_the_losses_that_a_recipe_may_name_are_those_of_trl() -> None:
    import inspect

    for name, known in (("DPOTrainer", "dpo"), ("KTOTrainer", "kto")):
        source = inspect.getsource(getattr(trl, name)._compute_loss)
        assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(TRL_OBJECTIVES[known].loss_types)


def test_a_sweep_goes_over_the_keys_of_the_objective() -> None:
    fields = {"base": "kit-base", "data": "rows.jsonl", "out": "adapters/a", "objective": "dpo"}
    check_values(parse_space({"train.beta": "0.05..0.5", "train.loss_type": ["sigmoid", "ipo"]}), fields)
    with pytest.raises(RecipeError, match=r"train\.desirable_weight"):
        check_values(parse_space({"train.desirable_weight": [1]}), fields)
    with pytest.raises(RecipeError, match=r"no key 'train\.betta'"):
        parse_space({"train.betta": [0.1]})


def test_a_sweep_compares_trials_by_a_metric_of_the_objective(tmp_path: Path) -> None:
    recipe = preference_recipe(tmp_path, "dpo", steps=2)
    report = sweep(recipe, {"train.beta": [0.1, 0.5]}, base=base_for("dpo"), metric="rewards/margins")
    values = [trial.value for trial in report.trials]
    assert None not in values
    assert report.best.value == max(values)
    with pytest.raises(RecipeError, match="kl"):
        sweep(recipe, {"train.beta": [0.1]}, metric="kl", replace=True)


def test_without_trl_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"needs TRL, which is not installed \(pip install 'lora-kit\[preferences\]'"):
        load_recipe({**LEAST, "objective": "dpo"})


def test_rows_of_another_kind_are_refused_with_what_takes_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"objective dpo takes .*task: causal-lm takes these rows, with objective: sft"):
        train(preference_recipe(tmp_path, "dpo", rows=PAIRS), base=base_of())
    with pytest.raises(DataError, match=r"task causal-lm takes .*objective: dpo, orpo, kto or reward learns"):
        train(recipe_of(tmp_path, rows=PREFERENCES), base=base_of())
    with pytest.raises(DataError, match=r"objective dpo takes .*objective: kto learns from these rows"):
        train(preference_recipe(tmp_path, "dpo", rows=FEEDBACK), base=base_of())


def test_an_adapter_of_the_head_has_no_reference(tmp_path: Path) -> None:
    lora = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    with pytest.raises(BankError, match="covers the head"):
        train(preference_recipe(tmp_path, "dpo", lora=lora), base=base_of())
    assert not list(tmp_path.glob("out*"))


def test_a_reward_model_has_one_score_and_its_head_is_trained(tmp_path: Path) -> None:
    report = train(preference_recipe(tmp_path, "reward", method="features", lora={}), base=reward_base())
    adapter = Adapter.load(report.out)
    assert adapter.config.modules_to_save == ("score",)
    assert isinstance(adapter.config, LoraConfig)
    assert [tuple(tensor.shape) for tensor in adapter.tensors.values()] == [(1, 32)]
    assert adapter.record["labels"] == ["reward"]


def test_kto_learns_from_pairs_as_single_answers(tmp_path: Path) -> None:
    report = train(preference_recipe(tmp_path, "kto", rows=PREFERENCES), base=base_of())
    assert report.after is not None
    assert report.after.samples == 2 * len(PREFERENCES)
    assert report.after.metrics()["rewards/margins"] > 0
