"""Several adapters trained in one pass: each with the bytes, the metrics and the checkpoints that it has alone."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from lora_kit.cli.main import main
from lora_kit.errors import DataError, RecipeError, VerificationError
from lora_kit.models.loading import Base
from lora_kit.names import THREAD_PREFIX
from lora_kit.training.loop.checkpoints import RunFolder
from lora_kit.training.loop.training_loop import TrainingLoop
from lora_kit.training.results import PartialTrainingError, TrainReport
from lora_kit.training.together.joint_model import JointModel
from lora_kit.training.together.packed_rows import RowBlock
from lora_kit.training.together.train_many import train_many
from lora_kit.training.train import train
from tests.support.interrupted import DROPOUT, SignalAt, results, run_of, unbroken
from tests.support.labeled_bases import POSITIVE_ROWS, save_sentiment_base
from tests.support.long_runs import take_few
from tests.support.processes import die, in_child
from tests.support.training import LABELED, base_of, recipe_of, same_state, state, weights_of

LONG = [{"prompt": "a " * n, "completion": "b " * (n % 3 + 1)} for n in range(1, 12)]
MIXED: dict[str, dict[str, Any]] = {
    "narrow": {"lora": {"r": 2}},
    "wide": {"lora": {"r": 16, "target_modules": ["q_proj", "down_proj"]}, "rows": LONG, "steps": 5},
    "clipped": {"lora": {"r": 5}, "train": {"max_grad_norm": 0.01, "gradient_accumulation_steps": 2}},
    "dropped": {"lora": {"r": 4, "lora_dropout": 0.3}, "train": {"learning_rate": 3e-2, "seed": 3}},
    "embedding": {"lora": {"r": 3, "target_modules": ["embed_tokens", "v_proj"]}, "train": {"warmup_steps": 2}},
    "stopped early": {
        "steps": 6,
        "train": {"eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 1, "learning_rate": 5.0},
    },
}


def recipes_of(folder: Path, cases: dict[str, dict[str, Any]], **common: Any) -> list[dict[str, Any]]:
    """Return a recipe for each case, with a folder of its own."""
    made = []
    for name, changes in cases.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        section = {**common, **changes, "train": {**common.get("train", {}), **changes.get("train", {})}}
        made.append(recipe_of(folder / name, **section))
    return made


def assert_as_alone(reports: Sequence[TrainReport], recipes: Sequence[dict[str, Any]], base: Base) -> None:
    for report, recipe in zip(reports, recipes, strict=True):
        alone = train(recipe, base=base, overrides={"out": f"{recipe['out']} alone"})
        assert weights_of(report) == weights_of(alone), report.out
        assert (report.steps, report.kept, report.tokens) == (alone.steps, alone.kept, alone.tokens)
        assert report.after is not None
        assert alone.after is not None
        assert report.after.metrics() == alone.after.metrics()
        assert [entry.get("loss") for entry in report.history] == [entry.get("loss") for entry in alone.history]


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the groups that were computed at once."""
    sizes: list[int] = []
    forward = JointModel.forward

    def note(model: JointModel, blocks: Any, autocast: Any) -> Any:
        if torch.is_grad_enabled():
            sizes.append(len(blocks))
        return forward(model, blocks, autocast)

    monkeypatch.setattr(JointModel, "forward", note)
    return sizes


@pytest.mark.parametrize(
    ("optim", "count"), [("sgd", 2), pytest.param("adamw_torch", len(MIXED), marks=pytest.mark.slow)]
)
def test_each_adapter_has_the_bytes_that_it_has_alone(
    tmp_path: Path, optim: str, count: int, groups: list[int]
) -> None:
    base = base_of()
    before = state(base.model)
    recipes = recipes_of(tmp_path, dict(list(MIXED.items())[:count]), train={"optim": optim})
    assert_as_alone(train_many(recipes, base=base), recipes, base)
    assert max(groups) == count
    assert same_state(base.model, before)
    assert all(parameter.requires_grad for parameter in base.model.parameters())


TWO: dict[str, dict[str, Any]] = {"one": {"lora": {"r": 2}}, "other": {"lora": {"r": 5}, "rows": LONG, "steps": 4}}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},  # which drops in its embeddings, its attention and its layers
    "bert": {"task": "classify", "rows": LABELED},
}


@pytest.mark.parametrize("kind", take_few(FAMILIES, "bert"))
def test_dropout_of_the_base_is_drawn_for_each_adapter_as_alone(tmp_path: Path, kind: str, groups: list[int]) -> None:
    base = base_of(kind, **({"labels": 2} if kind == "bert" else {}))
    cases = {"one": {"lora": {"r": 2}}, "other": {"lora": {"r": 5, "lora_dropout": 0.2}, "train": {"seed": 4}}}
    recipes = recipes_of(tmp_path, cases, **FAMILIES[kind])
    assert_as_alone(train_many(recipes, base=base), recipes, base)
    assert max(groups) == 2


@pytest.mark.slow
def test_packed_samples_of_an_adapter_attend_to_themselves(tmp_path: Path, groups: list[int]) -> None:
    base = base_of()
    recipes = recipes_of(tmp_path, {**TWO, "packed": {"lora": {"r": 3}, "rows": LONG}})
    recipes[-1]["data"] |= {"packing": True, "max_length": 40}
    assert_as_alone(train_many(recipes, base=base), recipes, base)
    assert max(groups) == 3


@pytest.mark.slow
def test_labels_of_adapters_may_differ(tmp_path: Path, groups: list[int]) -> None:
    folder = str(save_sentiment_base(tmp_path / "base", labels=("positive", "negative")))
    other = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}, {"text": "c", "label": "z"}]
    recipes = recipes_of(tmp_path, {"known": {"rows": POSITIVE_ROWS}, "new": {"rows": other}}, task="classify")
    recipes = [{**recipe, "base": folder} for recipe in recipes]
    reports = train_many(recipes)
    for report, recipe in zip(reports, recipes, strict=True):
        assert weights_of(report) == weights_of(train(recipe, overrides={"out": f"{recipe['out']} alone"}))
    assert max(groups) == 2


def test_one_that_fails_fails_alone(tmp_path: Path) -> None:
    base = base_of()
    recipes = recipes_of(tmp_path, {**TWO, "broken": {"train": {"learning_rate": 1e30}, "steps": 6}, "absent": {}})
    Path(recipes[-1]["data"]["train"]).unlink()
    with pytest.raises(
        PartialTrainingError, match=r"2 of 4 trainings failed:\n  .*broken.* became .*\n  .*absent"
    ) as caught:
        train_many(recipes, base=base)
    kinds = {Path(out).parent.name: type(error) for out, error in caught.value.errors.items()}
    assert kinds == {"broken": VerificationError, "absent": DataError}
    assert caught.value.exit_code == 4
    assert_as_alone(caught.value.reports, recipes[:2], base)
    assert not Path(recipes[2]["out"]).exists()


def test_what_ends_the_process_within_one_training_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*_: object, **__: object) -> None:
        raise SystemExit(7)

    monkeypatch.setattr("lora_kit.training.together.train_many.train_job", leave)
    with pytest.raises(SystemExit):
        train_many(recipes_of(tmp_path, TWO), base=base_of())


@pytest.mark.slow
def test_a_finished_adapter_makes_room_for_the_next(tmp_path: Path, groups: list[int]) -> None:
    base = base_of()
    recipes = recipes_of(tmp_path, {**TWO, "third": {"steps": 2}, "fourth": {"lora": {"r": 7}}})
    assert_as_alone(train_many(recipes, base=base, together=2), recipes, base)
    assert max(groups) == 2


@pytest.mark.slow
def test_what_needs_a_forward_of_its_own_is_trained_beside_the_others(
    tmp_path: Path, groups: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    base = base_of()
    alone = {"checkpointed": {"train": {"gradient_checkpointing": True}}, "head": {"method": "features"}}
    recipes = recipes_of(tmp_path, {**TWO, **alone})
    recipes[-1]["lora"] = {"target_modules": [], "modules_to_save": ["lm_head"]}
    assert_as_alone(train_many(recipes, base=base), recipes, base)
    assert max(groups) == 2
    assert "train.gradient_checkpointing changes the forward" in caplog.text


@pytest.mark.slow
def test_a_body_that_a_joint_forward_gets_wrong_is_computed_by_itself(
    tmp_path: Path, groups: list[int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RowBlock, "positions", property(lambda block: torch.zeros_like(block.inputs["input_ids"])))
    base = base_of()
    recipes = recipes_of(tmp_path, TWO)
    assert_as_alone(train_many(recipes, base=base), recipes, base)
    assert not groups
    assert "off in a packed forward" in caplog.text


@pytest.mark.slow
def test_memory_that_runs_out_makes_groups_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = base_of()
    forward, sizes = JointModel.forward, list[int]()

    def run_out(model: JointModel, blocks: Any, autocast: Any) -> Any:
        states = forward(model, blocks, autocast)  # which has drawn its random numbers
        if torch.is_grad_enabled():
            sizes.append(len(blocks))
            if len(blocks) > 2:
                raise torch.OutOfMemoryError
        return states

    monkeypatch.setattr(JointModel, "forward", run_out)
    recipes = recipes_of(tmp_path, {**TWO, "third": MIXED["dropped"], "fourth": {}})
    assert_as_alone(train_many(recipes, base=base), recipes, base)
    assert sizes.count(4) == 1
    assert max(sizes[1:]) == 2
    assert "memory ran out with 4 adapters at once" in caplog.text


REFUSED = {
    "method full changes the base": {"method": "full"},
    "its base is kit-base, that of .* is tiny": {"base": "kit-base"},
    "its dtype is bf16, that of .* is auto": {"dtype": "bf16"},
    "its quantize is nf4, that of .* is none": {"quantize": "nf4"},
    "its task is seq2seq, that of .* is causal-lm": {"task": "seq2seq"},
    "objective dpo has a loop of its own": {"objective": "dpo"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_recipes_that_do_not_go_together_are_rejected_by_name(tmp_path: Path, message: str) -> None:
    recipes = recipes_of(tmp_path, {"one": {}, "other": {}})
    recipes[1] |= REFUSED[message]
    with pytest.raises(RecipeError, match=f"other/out cannot be trained with others: {message}"):
        train_many(recipes)
    assert not Path(recipes[0]["out"]).exists()


def test_two_recipes_with_one_output_are_rejected(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    with pytest.raises(RecipeError, match="two recipes write to"):
        train_many([recipe, {**recipe, "lora": {"r": 2}}])


@pytest.mark.parametrize("place", ["{}/inner", "{}.run", "{}.run/checkpoint-2"])
def test_an_output_within_what_another_recipe_writes_is_rejected(tmp_path: Path, place: str) -> None:
    recipe = recipe_of(tmp_path)
    pair = [recipe, {**recipe, "out": place.format(recipe["out"])}]
    for recipes in (pair, pair[::-1]):
        with pytest.raises(RecipeError, match="lies in what is written for the other"):
            train_many(recipes)


def test_an_error_in_one_of_several_recipes_says_in_which(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    with pytest.raises(RecipeError, match=r"recipe 2 of 3: train.learning_rate must be a finite number"):
        train_many([recipe, {**recipe, "train": {"learning_rate": "fast"}}, recipe])


def test_a_base_with_routed_experts_is_rejected(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, vocab_size=96, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    base = dataclasses.replace(base_of(), model=transformers.MixtralForCausalLM(config).eval())
    with pytest.raises(RecipeError, match="routed experts"):
        train_many(recipes_of(tmp_path, TWO), base=base)


def test_one_recipe_is_trained_as_train_does(tmp_path: Path, groups: list[int]) -> None:
    base = base_of()
    recipes = recipes_of(tmp_path, {"one": {}})
    assert_as_alone(train_many(recipes, base=base), recipes, base)
    assert not groups


# Stopped and resumed


def test_a_killed_training_resumes_to_the_same_bytes_together_and_alone(tmp_path: Path, groups: list[int]) -> None:
    recipes = recipes_of(
        tmp_path, {"one": {"lora": DROPOUT}, "other": {"lora": {"r": 5}}}, steps=5, train={"save_steps": 2}
    )
    folders, write = [run_of(Path(recipe["out"])) for recipe in recipes], RunFolder.write

    def kill() -> None:
        count = itertools.count(1)
        RunFolder.write = lambda *a, **k: die() if next(count) == 4 else write(*a, **k)  # type: ignore[method-assign]
        train_many(recipes, base=base_of())

    assert in_child(kill) == -signal.SIGKILL
    assert all((folder / "checkpoint-2").is_dir() for folder in folders)
    copy = tmp_path / "copy.run"
    shutil.copytree(folders[1], copy)
    reports = train_many(recipes, base=base_of())
    assert [report.resumed > 0 for report in reports] == [True, True]
    assert max(groups) == 2
    for report, recipe in zip(reports, recipes, strict=True):
        assert results(report.out) == unbroken(recipe)
    resumed = train(recipes[1], base=base_of(), overrides={"out": str(tmp_path / "copy")})
    assert resumed.resumed == 2
    assert weights_of(resumed) == weights_of(reports[1])


@pytest.mark.slow
def test_a_signal_stops_all_after_a_checkpoint(tmp_path: Path) -> None:
    recipes = recipes_of(tmp_path, TWO, steps=5, train={"save_steps": 50})
    update = TrainingLoop.create_optimizer

    def interrupt(trainer: Any, *args: Any) -> Any:
        trainer.add_callback(SignalAt(1, signal.SIGINT))
        return update(trainer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "create_optimizer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_many(recipes, base=base_of())
    assert all(list(run_of(Path(recipe["out"])).glob("checkpoint-*")) for recipe in recipes)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_PREFIX)]
    base = base_of()
    reports = train_many(recipes, base=base)
    assert all(report.resumed for report in reports)
    for report, recipe in zip(reports, recipes, strict=True):
        assert weights_of(report) == weights_of(train(recipe, base=base, overrides={"out": f"{recipe['out']} alone"}))


# The command


def test_the_command_prints_a_line_for_each_and_ends_with_the_worst_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = recipes_of(tmp_path, {"one": {}, "other": {"lora": {"r": 2}}, "absent": {}}, steps=1)
    Path(recipes[2]["data"]["train"]).unlink()
    files = []
    for recipe in recipes:
        files.append(str(Path(recipe["out"]).with_suffix(".yaml")))
        Path(files[-1]).write_text(yaml.safe_dump({**recipe, "base": "kit-base"}))
    assert main(["train", *files, "--train.learning_rate", "1e-3", "--together", "2"]) == 2
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    outs = [recipe["out"] for recipe in recipes[:2]]
    assert [line.partition(":")[0] for line in lines[:2]] == outs
    assert all("1 steps, training loss" in line for line in lines[:2])
    assert any(all(out in line for out in outs) for line in lines[2:])  # a next command, for both
    assert "error: 1 of 3 trainings failed" in printed.err
    assert main(["train", *files[:2], "--out", "x"]) == 2
    assert "two recipes write to x" in capsys.readouterr().err
    assert main(["train", *files[:2], "--dry-run"]) == 2
    assert main(["train", files[0], "--together", "2"]) == 2
