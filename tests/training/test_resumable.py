"""A training that was stopped goes on where it stood and ends with the same bytes as one that never was."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from lora_kit.adapter.adapter import Adapter
from lora_kit.cli.main import main
from lora_kit.errors import RecipeError, StorageError, VerificationError
from lora_kit.models.loading import Base
from lora_kit.runs.run_files import RUN_FILES
from lora_kit.training.loop import checkpoints
from lora_kit.training.loop.checkpoints import RunFolder
from lora_kit.training.loop.weight_files import load_tensors
from lora_kit.training.train import train
from tests.support import texts
from tests.support.interrupted import DROPOUT, SignalAt, die_at, killed, long_recipe, results, run_of, unbroken
from tests.support.long_runs import take_few
from tests.support.processes import at_call, die, in_child
from tests.support.training import LABELED, PAIRS, At, base_of, recipe_of


def steps_kept(out: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in run_of(out).glob("checkpoint-*"))


class AtEpochEnd(transformers.TrainerCallback):
    """Dies at the end of an epoch, after what was saved at its last step and before what comes at its end."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if round(state.epoch) == self.epoch:
            die()


# The same bytes

EPOCHS = {"max_steps": -1, "num_train_epochs": 3}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {}),
    "accumulation": ("gpt2", {"train": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}}),
    "by length": ("llama", {"train": {"train_sampling_strategy": "group_by_length"}}),
    "evaluated": ("llama", {"train": {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}}),
    "epochs": ("llama", {"train": {**EPOCHS, "eval_strategy": "epoch", "logging_strategy": "epoch"}}),
    "saved by epoch": ("llama", {"train": {**EPOCHS, "save_strategy": "epoch"}}),
    "best kept": ("llama", {"train": {"learning_rate": 0.3, "eval_strategy": "steps", "eval_steps": 1,
                                      "early_stopping_patience": 5, "loraplus_lr_ratio": 2.0}}),
    "features": ("llama", {"method": "features", "lora": {}}),
    "new tokens": ("llama", {"lora": {**DROPOUT, "trainable_token_indices": {"embed_tokens": [9, 7], "lm_head": [7]}}}),
    "classify": ("bert", {"task": "classify", "rows": LABELED}),
    "dora, bf16": ("llama", {"lora": {**DROPOUT, "use_dora": True}, "train": {"bf16": True}}),
    "plateau": ("llama", {"train": {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps",
                                    "eval_steps": 1, "lr_scheduler_kwargs": {"patience": 0}}}),
}  # fmt: skip


@pytest.mark.parametrize("case", take_few(CASES, "lora", "classify"))
def test_killed_and_started_again_it_ends_with_the_same_bytes_and_log(tmp_path: Path, case: str) -> None:
    kind, changes = CASES[case]
    recipe = long_recipe(tmp_path, **changes)

    def base() -> Base:
        return base_of(kind, **({"labels": 2} if kind == "bert" else {}))

    expected = unbroken(recipe, base)
    killed(recipe, die_at(4), base=base)
    assert steps_kept(Path(recipe["out"]))
    killed(recipe, die_at(6), base=base)
    report = train(recipe, base=base())
    assert report.resumed >= 3
    assert results(report.out) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl", "unbroken"]


@pytest.mark.slow
def test_full_goes_on_too_where_checkpoints_are_asked_for(tmp_path: Path) -> None:
    section = {"save_strategy": "steps"}
    recipe = {**long_recipe(tmp_path, method="full", lora={}, train=section), "out": str(tmp_path / "out")}
    whole = train({**recipe, "out": str(tmp_path / "unbroken")}, base=base_of()).out
    killed(recipe, die_at(5))
    report = train(recipe, base=base_of())
    assert report.resumed == 4
    weights = [load_file(folder / "model.safetensors") for folder in (whole, report.out)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("epoch", take_few([1, 3], 3))
@pytest.mark.slow
def test_killed_between_the_last_step_of_an_epoch_and_its_end(tmp_path: Path, epoch: int) -> None:
    section = {**EPOCHS, "eval_strategy": "epoch", "logging_strategy": "epoch", "save_steps": 1}
    recipe = long_recipe(tmp_path, train=section)
    expected = unbroken(recipe)
    killed(recipe, AtEpochEnd(epoch))
    assert results(train(recipe, base=base_of()).out) == expected


@pytest.mark.slow
def test_killed_after_the_last_step_no_step_is_done_again(tmp_path: Path) -> None:
    recipe = long_recipe(tmp_path)
    expected = unbroken(recipe)

    def full() -> None:
        Path(recipe["out"]).mkdir()
        (Path(recipe["out"]) / "in the way").touch()

    with pytest.raises(StorageError, match="exists already"):
        train(recipe, base=base_of(), callbacks=[At(7, lambda _: full())])
    (Path(recipe["out"]) / "in the way").unlink()
    report = train(recipe, base=base_of(), callbacks=[At(8, lambda _: pytest.fail("a step too many"))])
    assert report.resumed == report.steps == 7
    assert results(report.out) == expected


# Stopped by a signal


STOPPED: dict[int, type[BaseException]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}


@pytest.mark.parametrize(
    ("number", "at", "moment", "stands", "section"),
    [
        (signal.SIGINT, 2, "on_step_begin", 3, {}),
        pytest.param(
            *(signal.SIGTERM, 3, "on_step_begin", 4),
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
            marks=pytest.mark.slow,
        ),
        pytest.param(signal.SIGINT, 2, "on_step_begin", 3, {"save_strategy": "no"}, marks=pytest.mark.slow),
        (signal.SIGINT, 3, "on_evaluate", 3, {**EPOCHS, "eval_strategy": "epoch", "logging_strategy": "epoch"}),
        pytest.param(
            *(signal.SIGINT, 5, "on_evaluate", 5, {"eval_strategy": "steps", "eval_steps": 5}), marks=pytest.mark.slow
        ),
        pytest.param(signal.SIGTERM, 6, "on_step_begin", 7, {}, marks=pytest.mark.slow),
    ],
    ids=["within a step", "SIGTERM", "no checkpoints on the way", "end of an epoch", "evaluation", "last step"],
)
def test_a_signal_stops_after_the_step_with_a_checkpoint(
    tmp_path: Path, number: int, at: int, moment: str, stands: int, section: Any, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = long_recipe(tmp_path, train={"save_steps": 100, **section})
    expected = unbroken(recipe)
    handlers = [signal.getsignal(number) for number in STOPPED]
    with pytest.raises(STOPPED[number]) as stopped:
        train(recipe, base=base_of(), callbacks=[SignalAt(at, number, moment=moment)])
    assert getattr(stopped.value, "code", 143) == 143
    assert [signal.getsignal(number) for number in STOPPED] == handlers
    assert steps_kept(Path(recipe["out"])) == [stands]
    assert f"the same command resumes from the checkpoint of step {stands} in" in caplog.messages[-1]
    report = train(recipe, base=base_of())
    assert report.resumed == stands
    assert results(report.out) == expected
    assert not run_of(report.out).exists()


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    recipe = long_recipe(tmp_path)
    expected = unbroken(recipe)
    twice = SignalAt(5, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, base=base_of(), callbacks=[twice, At(6, lambda _: pytest.fail("a step too many"))])
    assert steps_kept(Path(recipe["out"])) == [2, 4]
    assert results(train(recipe, base=base_of()).out) == expected


def test_an_interrupt_that_the_process_ignores_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        report = train(long_recipe(tmp_path), base=base_of(), callbacks=[SignalAt(2, signal.SIGINT)])
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert report.steps == 7


@pytest.mark.parametrize("number", take_few(STOPPED, signal.SIGTERM))
def test_a_command_stopped_by_a_signal_exits_with_its_code_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    recipe = recipe_of(tmp_path, base="kit-base", lora=DROPOUT, steps=4)
    expected = unbroken(recipe, lambda: None)  # type: ignore[arg-type, return-value]
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    from lora_kit.training.loop.trainer import Trainer

    work = Trainer.training_step

    def interrupted(self: Any, *given: Any) -> Any:
        if self.state.global_step == 2:
            os.kill(os.getpid(), number)
        return work(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted)
        assert main(["train", str(tmp_path / "recipe.yaml")]) == 128 + number
    told = capsys.readouterr().err
    assert "the same command resumes from the checkpoint of step 3" in told
    assert "Traceback" not in told
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    assert "continued from step 3" in " ".join(capsys.readouterr().out.split())
    assert results(Path(recipe["out"])) == expected


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    recipe = long_recipe(tmp_path, steps=40, train={"save_steps": 3, "eval_strategy": "steps", "eval_steps": 5})
    started = time.perf_counter()
    expected = unbroken(recipe)
    length = time.perf_counter() - started
    moments, resumed = random.Random(0), []
    for number in range(10 if os.environ.get("LORA_KIT_LONG") == "1" else 4):
        again = {**recipe, "out": str(tmp_path / f"out{number}")}
        child = os.fork()
        if child == 0:
            train(again, base=base_of())
            os._exit(0)
        time.sleep(moments.uniform(0.1, 1.1) * length)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        report = train(again, base=base_of(), replace=True)
        assert results(report.out) == expected
        assert not run_of(report.out).exists()
        resumed.append(report.resumed)
    assert any(resumed), "no kill found a training under way"


# Writing checkpoints


def test_a_checkpoint_is_of_the_size_of_the_adapter(tmp_path: Path) -> None:
    recipe = long_recipe(tmp_path)
    base = base_of()
    killed(recipe, die_at(5))
    for step in (2, 4):
        folder = run_of(Path(recipe["out"])) / f"checkpoint-{step}"
        kept = load_tensors(folder / "weights.safetensors")
        assert {name.rpartition(".")[2] for name in kept} == {"0"} or all("lora" in name for name in kept)
        assert not set(kept) & set(base.model.state_dict())
        assert (
            sum(path.stat().st_size for path in folder.iterdir())
            < 5 * 4 * sum(t.numel() for t in kept.values()) + 2**16
        )


def test_old_checkpoints_go(tmp_path: Path) -> None:
    recipe = long_recipe(tmp_path, train={"save_steps": 1, "save_total_limit": 3})
    killed(recipe, die_at(6))
    assert steps_kept(Path(recipe["out"])) == [3, 4, 5]
    assert train(recipe, base=base_of()).resumed == 5
    assert not run_of(Path(recipe["out"])).exists()


@pytest.mark.slow
def test_without_checkpoints_only_the_log_is_written_on_the_way(tmp_path: Path) -> None:
    recipe = long_recipe(tmp_path, train={"save_strategy": "no"})
    killed(recipe, die_at(6))
    assert {path.name for path in run_of(Path(recipe["out"])).iterdir()} == set(RUN_FILES)
    assert train(recipe, base=base_of()).resumed == 0
    assert not run_of(Path(recipe["out"])).exists()


@pytest.mark.parametrize("number", take_few(range(1, 60, 2), 27))
def test_killed_at_any_call_that_writes_a_checkpoint(tmp_path: Path, number: int) -> None:
    recipe = long_recipe(tmp_path, steps=5, train={"save_steps": 2})
    expected = unbroken(recipe)

    def from_there(_: Any) -> None:
        at_call(number, die, below=run_of(Path(recipe["out"])))

    in_child(lambda: train(recipe, base=base_of(), callbacks=[At(2, from_there)]))
    report = train(recipe, base=base_of(), replace=True)
    assert results(report.out) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl", "unbroken"]


@pytest.mark.slow
def test_a_full_disk_at_a_checkpoint_stops_the_run_and_keeps_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = long_recipe(tmp_path)
    expected = unbroken(recipe)
    fact = checkpoints.hash_file

    def refuses(path: Path) -> dict[str, Any]:
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device")
        return fact(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "hash_file", refuses)
        with pytest.raises(StorageError, match="No space left"):
            train(recipe, base=base_of())
    report = train(recipe, base=base_of())
    assert report.resumed == 2
    assert results(report.out) == expected


def test_weights_that_are_not_numbers_are_never_kept(tmp_path: Path) -> None:
    def poison(model: Any) -> None:
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))

    recipe = long_recipe(tmp_path, train={"logging_steps": 100})
    with pytest.raises(VerificationError, match="not finite by step 4"):
        train(recipe, base=base_of(), callbacks=[At(4, poison)])
    assert steps_kept(Path(recipe["out"])) == [2]


# Torn ones


def damage(folder: Path, how: str) -> None:
    weights, marker = folder / "weights.safetensors", folder / "checkpoint.json"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "a bit":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif how == "missing":
        (folder / "optimizer.pt").unlink()
    elif how == "no marker":
        marker.unlink()
    elif how == "empty marker":
        marker.write_bytes(b"")
    else:
        marker.write_text('{"format": 1}')


@pytest.mark.parametrize(
    "how", take_few(["cut", "a bit", "missing", "no marker", "empty marker", "short marker"], "a bit")
)
def test_a_torn_checkpoint_is_passed_over_and_that_is_said(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = long_recipe(tmp_path)
    expected = unbroken(recipe)
    killed(recipe, die_at(5))
    damage(run_of(Path(recipe["out"])) / "checkpoint-4", how)
    report = train(recipe, base=base_of())
    assert report.resumed == 2
    assert "checkpoint-4 is incomplete and is removed" in caplog.text
    assert results(report.out) == expected


@pytest.mark.slow
def test_where_all_are_torn_it_begins_anew(tmp_path: Path) -> None:
    recipe = long_recipe(tmp_path)
    killed(recipe, die_at(5))
    for step in (2, 4):
        damage(run_of(Path(recipe["out"])) / f"checkpoint-{step}", "cut")
    assert train(recipe, base=base_of()).resumed == 0


# Another recipe, other data, another base


CHANGED: list[tuple[dict[str, Any], str]] = [
    ({"train.learning_rate": 0.02}, r"train.learning_rate was 0.01, is 0.02"),
    ({"train.max_steps": 8, "lora.r": 4}, r"(?s)lora.r was 8, is 4.*train.max_steps was 7, is 8"),
    ({"train.weight_decay": 0.1}, r"train.weight_decay was not set, is 0.1"),
    ({"method": "features", "lora.lora_dropout": 0.0}, r'method was "lora", is "features"'),
]


def test_a_changed_recipe_is_refused_with_the_difference(tmp_path: Path) -> None:
    recipe = long_recipe(tmp_path)
    killed(recipe, die_at(5))
    before = steps_kept(Path(recipe["out"]))
    for changes, message in CHANGED:
        with pytest.raises(RecipeError, match=message) as caught:
            train(recipe, base=base_of(), overrides=changes)
        assert "run at step 4" in str(caught.value)
        assert "--replace" in caught.value.hint
        assert steps_kept(Path(recipe["out"])) == before
    assert train(recipe, base=base_of(), overrides=changes, replace=True).resumed == 0
    assert not run_of(Path(recipe["out"])).exists()


def test_changed_rows_and_another_base_are_refused(tmp_path: Path) -> None:
    recipe = long_recipe(tmp_path)
    expected = unbroken(recipe)
    killed(recipe, die_at(5))
    other = base_of()
    with torch.no_grad():
        other.model.lm_head.weight.add_(1)
    with pytest.raises(RecipeError, match=r"sha256\.base was"):
        train(recipe, base=other)
    rows = texts.write(tmp_path / "rows.jsonl", [*PAIRS[:4], {"prompt": "e", "completion": "f g"}])
    with pytest.raises(RecipeError, match=r"(?s)sha256.rows.train was.*sha256.rows.validation was"):
        train(recipe, base=base_of())
    rows.unlink()
    moved = str(texts.write(tmp_path / "moved.jsonl", PAIRS))
    report = train({**recipe, "data": {"train": moved, "validation": moved}}, base=base_of())
    assert report.resumed == 4  # the same rows in another file
    assert results(report.out) == expected


@pytest.mark.slow
def test_replacing_goes_on_with_a_run_of_the_same_recipe(tmp_path: Path) -> None:
    recipe = long_recipe(tmp_path)
    expected = unbroken(recipe)
    train(recipe, base=base_of(), overrides={"train.seed": 1})
    killed(recipe, die_at(5), replace=True)
    with pytest.raises(StorageError, match="exists already"):
        train(recipe, base=base_of())
    report = train(recipe, base=base_of(), replace=True)
    assert report.resumed == 4
    assert results(report.out) == expected


def test_checkpoints_left_behind_by_a_run_that_was_done_go_with_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = long_recipe(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "remove", lambda self: None)
        report = train(recipe, base=base_of())
    assert steps_kept(report.out) == [6, 7]
    kept = results(report.out)
    with pytest.raises(StorageError, match="exists already"):
        train(recipe, base=base_of())
    assert not run_of(report.out).exists()
    assert results(report.out) == kept
    assert Adapter.load(report.out).digest == report.digest


def test_of_two_processes_that_train_one_output_the_second_is_told(tmp_path: Path) -> None:
    recipe = long_recipe(tmp_path)
    told: list[str] = []

    def second(_: Any) -> None:
        with pytest.raises(StorageError, match="another process is writing") as caught:
            train(recipe, base=base_of())
        told.append(str(caught.value))

    train(recipe, base=base_of(), callbacks=[At(3, second)])
    assert len(told) == 1


def test_what_else_lies_in_the_run_folder_stays(tmp_path: Path) -> None:
    recipe = long_recipe(tmp_path)
    run_of(Path(recipe["out"])).mkdir()
    (run_of(Path(recipe["out"])) / "thesis.txt").write_text("mine")
    train(recipe, base=base_of())
    assert [path.name for path in run_of(Path(recipe["out"])).iterdir()] == ["thesis.txt"]


# What is asked of transformers


@pytest.mark.parametrize("name", ["_save_checkpoint", "_load_from_checkpoint", "_load_rng_state"])
def test_a_transformers_without_a_method_that_is_needed_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delattr(transformers.Trainer, name)
    with pytest.raises(VerificationError, match=f"transformers {transformers.__version__} has no Trainer.{name}"):
        train(long_recipe(tmp_path), base=base_of())
    assert not run_of(tmp_path / "out").exists()


@pytest.mark.parametrize("name", take_few(["_load_from_checkpoint", "_load_rng_state"], "_load_rng_state"))
def test_a_transformers_that_goes_on_in_another_way_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from lora_kit.training.loop.resumable import ResumableTrainer

    recipe = long_recipe(tmp_path)
    killed(recipe, die_at(5))
    monkeypatch.setattr(ResumableTrainer, name, lambda *_: None)  # as if it were not called
    with pytest.raises(VerificationError, match="did not resume from a checkpoint as expected"):
        train(recipe, base=base_of())
    assert not (tmp_path / "out").exists()
