"""GRPO: the model answers prompts, and functions of a Python file reward the answers; the loss is TRL's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lora_kit.adapter.adapter import Adapter
from lora_kit.cli.main import main
from lora_kit.data.preparation.prepare import prepare
from lora_kit.errors import BankError, DataError, RecipeError
from lora_kit.training.plan.plan import plan
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.recipe.objectives import TRL_OBJECTIVES, reason_not_shareable
from lora_kit.training.report import train_page
from lora_kit.training.train import train
from tests.support import texts
from tests.support.grpo import PROMPTS, REWARDS, grpo_recipe
from tests.support.interrupted import die_at, killed, results, unbroken
from tests.support.preferences import KeepStart
from tests.support.training import base_of, same_state, state, weights_of

trl = pytest.importorskip("trl", reason="TRL is not installed (pip install 'lora-kit[preferences]')")
pytestmark = pytest.mark.filterwarnings("ignore:`(gradient|is_gradient)_checkpointing:FutureWarning")
LEAST: dict[str, Any] = {"base": "kit-base", "data": "rows.jsonl", "out": "adapters/x", "objective": "grpo"}
MEASURED = ("loss", "grad_norm", "reward", "rewards/lower/mean", "rewards/short/mean", "completions/mean_length", "kl")


@pytest.fixture(autouse=True)
def _no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")


def measured_of(history: Any) -> list[list[float]]:
    """Return what is measured of each step in a log; answers that are learned from again have no reward."""
    return [[entry.get(name, 0.0) for name in MEASURED] for entry in history if "grad_norm" in entry]


def train_with_trl(recipe: dict[str, Any], start: Adapter, folder: Path) -> list[list[float]]:
    """Train the same prompts with TRL and PEFT alone, from the same adapter, and return what was measured."""
    import datasets
    import peft

    base = base_of()
    model = peft.get_peft_model(base.model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    peft.set_peft_model_state_dict(model, dict(start.tensors))
    code: dict[str, Any] = {}
    exec(REWARDS, code)
    args = trl.GRPOConfig(
        str(folder / "trl"), seed=0, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        save_strategy="no", disable_tqdm=True, reward_weights=[1.0, 0.5], **recipe["train"],
    )  # fmt: skip
    data = datasets.Dataset.from_list(PROMPTS)
    trainer = trl.GRPOTrainer(
        model, [code["lower"], code["short"]], args=args, train_dataset=data, processing_class=base.tokenizer
    )
    trainer.train()
    return measured_of(trainer.state.log_history)


def test_losses_rewards_and_gradients_are_those_of_trl_with_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = KeepStart(monkeypatch)
    section = {"beta": 0.1, "num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 8}
    recipe = grpo_recipe(tmp_path, rewards=["lower", "short"], train=section | {"per_device_train_batch_size": 4})
    recipe["rewards"][1] = {"function": recipe["rewards"][1], "weight": 0.5}
    found = measured_of(train(recipe, base=base_of()).history)
    assert start.adapter is not None
    expected = train_with_trl(recipe, start.adapter, tmp_path)
    assert len(found) == len(expected) == 8  # into the second epoch
    for own, other in zip(found, expected, strict=True):
        assert own == pytest.approx(other, abs=1e-4)
    assert len({values[0] for values in found}) > 3  # the losses move


def test_the_reward_rises_and_nothing_but_the_adapter_changes(tmp_path: Path) -> None:
    base = base_of()
    with torch.no_grad():
        base.model.get_output_embeddings().weight.mul_(30)  # random weights prefer no token: so they can
    before, attributes = state(base.model), set(vars(base.model))
    section = {"per_device_train_batch_size": 16, "num_generations": 8, "max_completion_length": 4}
    report = train(grpo_recipe(tmp_path, steps=8, train=section), base=base)
    assert report.before is not None
    assert report.after is not None
    assert report.after.metrics()["reward"] > report.before.metrics()["reward"] + 0.4
    assert report.before.samples == len(PROMPTS)
    assert report.tokens > 8 * 16 * 4  # prompts and answers
    assert same_state(base.model, before)
    assert set(vars(base.model)) == attributes
    assert Adapter.load(report.out).record["recipe"]["rewards"].endswith("rewards.py:lower")


def test_checkpointed_layers_and_evaluations_change_nothing(tmp_path: Path) -> None:
    found = []
    for name, section in (("plain", {}), ("other", {"gradient_checkpointing": True, "eval_strategy": "epoch"})):
        folder = tmp_path / name
        folder.mkdir()
        report = train(grpo_recipe(folder, train=section), base=base_of())
        found.append(weights_of(report))
    assert found[0] == found[1]


# Stopped and resumed


LIVE = {"num_iterations": 3, "gradient_accumulation_steps": 1}
OVER_STEPS = {"steps_per_generation": 3, "per_device_train_batch_size": 4}
OVER_STEPS |= {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 100}


@pytest.mark.slow
@pytest.mark.parametrize("section", [{}, LIVE, OVER_STEPS], ids=["one step", "iterations", "steps"])
def test_a_run_that_was_killed_ends_with_the_same_bytes(section: dict[str, Any], tmp_path: Path) -> None:
    """Checkpoints lie in the second epoch, between two generations, and where both are."""
    section = {"save_steps": 2, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 4, **section}
    recipe = grpo_recipe(tmp_path, steps=9, train=section)
    expected = unbroken(recipe)
    killed(recipe, die_at(5))
    report = train(recipe, base=base_of())
    assert report.resumed == 4
    assert results(Path(recipe["out"])) == expected


# Before any work


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def other(**kwargs): pass", r"rewards.py has no function lower \(did you mean 'other'"),
        ("def lower(completions): return []", r"lower cannot be called with prompts, .*\(\*\*kwargs takes the rest"),
        ("def lower(answer, **kwargs): return []", r"missing a required argument: 'answer'"),
        ("async def lower(**kwargs): return []", r"lower is async"),
        ("lower = 3", r"lower is int, not a function"),
        ("import nowhere_at_all", r"cannot be run: ModuleNotFoundError: .*\(line 1\)"),
        ("a = 1\ndef lower(:", r"cannot be run: SyntaxError: .*\(line 2\)"),
    ],
)
def test_a_file_of_rewards_that_cannot_work_is_refused_first(code: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        train(grpo_recipe(tmp_path, code=code), base=base_of())
    assert not list(tmp_path.glob("out*"))
    assert not list(tmp_path.glob("__pycache__"))


def test_a_missing_file_of_rewards_is_named_with_where_paths_start(tmp_path: Path) -> None:
    recipe = grpo_recipe(tmp_path) | {"rewards": "none.py:lower"}
    with pytest.raises(RecipeError, match=r"none.py cannot be read: No such file.* starts from the working directory"):
        train(recipe, base=base_of())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[1.0]", r"lower returned 1 rewards for 8 answers"),
        ("0.5", r"lower returned 0.5; a list of 8 numbers was expected"),
        ("[float('nan')] * 8", r"lower returned nan for the answer"),
        ("['good'] * 8", r"lower returned 'good' for the answer"),
        ("1 / 0", r"lower failed: ZeroDivisionError: division by zero \(line 1\)"),
    ],
)
def test_a_reward_that_is_no_number_stops_the_training(body: str, message: str, tmp_path: Path) -> None:
    recipe = grpo_recipe(tmp_path, code=f"def lower(**kwargs): return {body}", steps=1)
    del recipe["data"]["validation"]
    with pytest.raises(RecipeError, match=message):
        train(recipe, base=base_of())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"objective grpo needs rewards"),
        ({"rewards": "a.py"}, r"rewards\[0\] must be FILE.py:FUNCTION; 'a.py' was given"),
        ({"rewards": ["a.py:f", "b.py:f"]}, r"two functions of the name f"),
        ({"rewards": {"function": "a.py:f", "weigt": 2}}, r"unknown key rewards\[0\].weigt"),
        ({"rewards": "a.py:f", "objective": "dpo"}, r"rewards are for objective grpo; the objective is dpo"),
        ({"rewards": "a.py:f", "train": {"use_vllm": True}}, r"train.use_vllm cannot be set .*the model itself"),
        ({"rewards": "a.py:f", "train": {"vllm_mode": "server"}}, r"train.vllm_mode cannot be set"),
        ({"rewards": "a.py:f", "train": {"reward_weights": [1]}}, r"reward_weights cannot be set .*have weights"),
        ({"rewards": "a.py:f", "train": {"cast_lm_head_to_fp32": True}}, r"it changes the base"),
        ({"rewards": "a.py:f", "train": {"num_generations": 1}}, r"must be 2 or more answers"),
        ({"rewards": "a.py:f", "train": {"num_generations": 5}}, r"8 answers are generated at once, .* multiple"),
        ({"rewards": "a.py:f", "train": {"beta": -1}}, r"train.beta must be 0 or more"),
        ({"rewards": "a.py:f", "train": {"loss_type": "dapoo"}}, r"did you mean 'dapo'"),
        ({"rewards": "a.py:f", "train": {"metric_for_best_model": "loss"}}, r"metric_for_best_model"),
        ({"rewards": "a.py:f", "data": {"train": "a", "packing": True}}, r"data.packing does not go with"),
        ({"rewards": "a.py:f", "method": "full"}, r"method full does not go with"),
    ],
)
def test_a_recipe_that_cannot_be_trained_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({**LEAST, **changes})


def test_a_recipe_is_read_from_what_it_writes_and_compares_by_the_reward() -> None:
    rewards = ["a.py:f", {"function": "a.py:g", "weight": 0.5}]
    section = {"early_stopping_patience": 2, "eval_strategy": "epoch", "save_strategy": "epoch", "beta": 0}
    data = {"train": "rows.jsonl", "validation": "rows.jsonl"}
    recipe = load_recipe({**LEAST, "data": data, "rewards": rewards, "train": section})
    assert load_recipe(recipe.to_dict()) == recipe
    assert recipe.to_dict()["rewards"] == rewards
    assert (recipe.train["metric_for_best_model"], recipe.train["greater_is_better"]) == ("reward", True)


def test_the_losses_that_a_recipe_may_name_are_those_of_trl() -> None:
    import inspect

    source = inspect.getsource(trl.GRPOTrainer._compute_loss)
    listed = re.findall(r"loss_type (?:==|in) (\[.*?\]|\".*?\")", source)
    assert {name for text in listed for name in re.findall(r"\w+", text)} == set(TRL_OBJECTIVES["grpo"].loss_types)


def test_several_processes_are_refused() -> None:
    assert reason_not_shareable("grpo", {}) == "objective grpo compares the answers of a whole batch"


def test_too_few_prompts_and_too_long_answers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"one generation takes 8 prompts, 4 answers to each, and there are 6"):
        train(grpo_recipe(tmp_path, train={"per_device_train_batch_size": 32}), base=base_of())
    with pytest.raises(RecipeError, match=r"an answer may have 48 tokens, and .* 48 together"):
        train(grpo_recipe(tmp_path, train={"max_completion_length": 48}), base=base_of())


def test_an_adapter_of_the_head_is_refused(tmp_path: Path) -> None:
    lora = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    with pytest.raises(BankError, match="covers the head"):
        train(grpo_recipe(tmp_path, lora=lora), base=base_of())


def test_a_plan_counts_steps_in_answers(tmp_path: Path) -> None:
    recipe = grpo_recipe(tmp_path, train={"max_steps": -1, "num_train_epochs": 3})
    found = plan(recipe, base=base_of())
    assert (found.data.rows, found.steps.per_epoch, found.steps.steps) == (6, 3, 9)  # two prompts in a step
    assert found.measured.tokens > 0
    assert found.memory.activations > 0
    assert not list(tmp_path.glob("out*"))


# Rows


def test_columns_reach_the_functions_as_they_were_written(tmp_path: Path) -> None:
    code = """
def seen(prompts, target, note, **kwargs):
    assert set(zip(prompts, target, map(repr, note))) <= {("a ", 1, "{'x': [1, 'y']}"), ("b ", "two", "None")}
    return [float(prompt == "a ") for prompt in prompts]
"""
    rows = [{"prompt": "a ", "target": 1, "note": {"x": [1, "y"]}}, {"prompt": "b ", "target": "two"}]
    report = train(grpo_recipe(tmp_path, code=code, rewards="seen", rows=rows, steps=1), base=base_of())
    assert report.after is not None
    assert report.after.metrics()["reward"] == 0.5


def test_prompts_may_be_conversations(tmp_path: Path) -> None:
    code = """
def role(prompts, completions, **kwargs):
    assert prompts[0][-1] == {"role": "user", "content": "hi"}
    return [float(len(answer[0]["content"]) > 4) for answer in completions if answer[0]["role"] == "assistant"]
"""
    rows = [{"prompt": [{"role": "user", "content": "hi"}], "kind": n} for n in range(4)]
    recipe = grpo_recipe(tmp_path, code=code, rewards="role", rows=rows, steps=1)
    recipe["data"] |= {"chat_template": "plain", "separator": "\n"}
    report = train(recipe, base=base_of())
    assert report.after is not None
    assert report.after.samples == 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, r"and no prompt \(give .* lora-kit prepare --rename question=prompt"),
        ({"prompt": "a", "completion": "b"}, r"would not be given the column completion"),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, r"the last message must be one that can be answered"),
        ({"prompt": ""}, r"prompt is empty"),
    ],
)
def test_rows_that_cannot_be_answered_are_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        train(grpo_recipe(tmp_path, rows=[row]), base=base_of())


def test_rows_without_an_answer_name_the_objective_that_takes_them(tmp_path: Path) -> None:
    file = str(texts.write(tmp_path / "prompts.jsonl", [{"prompt": "a"}]))
    with pytest.raises(DataError, match=r"objective: grpo learns from answers of the model's own"):
        train({**LEAST, "objective": "sft", "data": file, "out": str(tmp_path / "x")}, base=base_of())


# What is prepared, shown and continued


def test_prepare_writes_a_recipe_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"what is {n}", "completion": f"{n}"} for n in range(24)]
    source = texts.write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rewards.py").write_text("def has(answer, **kwargs): return [float(len(a)) for a in answer]", "utf-8")
    rename = {"question": "prompt", "completion": "answer"}
    made = prepare(source, tmp_path / "made", rewards=["rewards.py:has"], rename=rename, max_length=64, share=0.2)
    assert made.recipe is not None
    recipe = load_recipe(made.recipe, overrides={"train.max_steps": 1, "out": "adapters/x"})
    assert (recipe.objective, recipe.rewards[0].name) == ("grpo", "rewards.py:has")
    report = train(recipe.replace(base="tiny"), base=base_of())
    assert report.after is not None
    assert report.after.samples == len(made.validation or ())
    with pytest.raises(DataError, match=r"prompts without answers \(functions .*--rewards rewards.py:has_answer"):
        prepare(texts.write(tmp_path / "alone.jsonl", [{"prompt": str(n)} for n in range(4)]), tmp_path / "other")


def test_only_a_training_runs_the_file_of_rewards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = grpo_recipe(tmp_path, code="raise RuntimeError('it runs')") | {"base": "kit-base"}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), "utf-8")
    assert main(["preview", str(file)]) == 0
    assert "the model writes answers of up to 8 tokens, which are rewarded" in capsys.readouterr().out
    assert main(["train", str(file), "--dry-run"]) == 2
    assert "cannot be run: RuntimeError: it runs (line 1)" in capsys.readouterr().err


@pytest.mark.report
def test_the_report_has_the_curves_and_answers_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_page, "plot_curves", lambda title, *args, **kwargs: f"<b>{title}</b>")
    report = train(grpo_recipe(tmp_path, rewards=["lower", "short"], steps=2), base=base_of())
    page = (report.out / "report.html").read_text("utf-8")
    for text in ("training reward", "training rewards/short", "training tokens of an answer"):
        assert f"<b>{text}</b>" in page
    assert "a longer prompt" in page
    assert "(higher is better)" in page


def test_a_starting_adapter_is_the_reference(tmp_path: Path) -> None:
    first = train(grpo_recipe(tmp_path, steps=2), base=base_of())
    recipe = grpo_recipe(tmp_path, lora={}, steps=2, train={"beta": 0.1}) | {"from": str(first.out)}
    second = train(recipe | {"out": str(tmp_path / "second")}, base=base_of())
    assert second.before is not None
    assert second.after is not None
    assert second.before.metrics()["kl"] == pytest.approx(0, abs=1e-6)
    assert second.after.metrics()["kl"] > 1e-5


def test_answers_are_generated_without_dropout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[bool] = []
    base = base_of()
    generate = type(base.model).generate
    monkeypatch.setattr(
        type(base.model), "generate", lambda self, *a, **k: modes.append(self.training) or generate(self, *a, **k)
    )
    lora = {"r": 4, "lora_dropout": 0.5}
    recipe = grpo_recipe(tmp_path, steps=1, lora=lora, train={"disable_dropout": False})
    del recipe["data"]["validation"]
    train(recipe, base=base)
    assert modes == [False]


def test_after_a_reward_that_failed_the_changed_file_goes_on_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = """def lower(completions, trainer_state, **kwargs):
    return [1 / (3 - trainer_state.global_step)] * len(completions)"""
    recipe = grpo_recipe(tmp_path, code=code, train={"save_steps": 2})
    del recipe["data"]["validation"]
    with pytest.raises(RecipeError, match=r"lower failed: ZeroDivisionError: .*\(line 2\)"):
        train(recipe, base=base_of())
    grpo_recipe(tmp_path)
    with caplog.at_level("INFO"):
        assert train(recipe, base=base_of()).resumed == 2
    assert "rewards.lower was" in caplog.text
