"""Several processes train what one would: the same rows in a step, the same numbers, one output."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_kit.adapter.adapter import Adapter
from lora_kit.errors import REPORTED_ELSEWHERE, RecipeError, StorageError, VerificationError
from lora_kit.io.atomic_write import lock_output
from lora_kit.models.loading import Base
from lora_kit.training.job.job import Job
from lora_kit.training.loop.checkpoints import RunFolder
from lora_kit.training.loop.sharded_base import count_own_bytes, shard_base
from lora_kit.training.loop.world import join_world
from lora_kit.training.plan.plan import plan
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.train import train
from tests.support.interrupted import results, run_of
from tests.support.memory import device_is_full
from tests.support.preferences import FEEDBACK, PREFERENCES
from tests.support.processes import die
from tests.support.training import LABELED, PAIRS, At, base_of, recipe_of
from tests.support.worlds import get_rank, in_processes, launch

ROWS = [*PAIRS, *({"prompt": word, "completion": "x y " * n} for word, n in (("g", 9), ("hi", 1), ("j", 4), ("k", 2)))]
SGD = {"optim": "sgd", "learning_rate": 0.5, "logging_steps": 1}
COMPARED = ("step", "loss", "grad_norm", "eval_loss", "train_loss", "tokens", "rewards/margins")
DROPOUT = {"lora_dropout": 0.2}


def recipe_for(folder: Path, processes: int, *, size: int = 4, out: str = "", **changes: Any) -> dict[str, Any]:
    """Return a recipe whose steps have twice as many rows as `size`, however many processes share them."""
    section = {"per_device_train_batch_size": size // processes, "gradient_accumulation_steps": 2, **SGD,
               **changes.pop("train", {})}  # fmt: skip
    named = str(folder / (out or f"out-{processes}"))
    return recipe_of(folder, rows=changes.pop("rows", ROWS), train=section, out=named, **changes)


def base_for(kind: str) -> Base:
    return base_of(kind, **({"labels": 2} if kind == "bert" else {}))


def train_in(processes: int, recipe: dict[str, Any], base: Callable[[], Base] = base_of, *callbacks: Any) -> list[Any]:
    """Return what the training of each process returned (its output), raised, or exited with."""
    return in_processes(lambda: train(recipe, base=base(), callbacks=callbacks).out, size=processes)


def assert_same_adapter(first: Path, second: Path, *, within: float = 1e-6) -> None:
    expected, found = Adapter.load(first).tensors, Adapter.load(second).tensors
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=within)


def assert_same_log(first: Path, second: Path, *, within: float = 1e-5) -> None:
    logs = [
        [{key: line[key] for key in COMPARED if key in line} for line in results(out)[1]] for out in (first, second)
    ]
    assert len(logs[0]) == len(logs[1])
    for lines in zip(*logs, strict=True):
        assert lines[1] == pytest.approx(lines[0], abs=within)


# What is trained

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {}),
    "by length, averaged": ("llama", {"train": {"train_sampling_strategy": "group_by_length", "ema_decay": 0.5}}),
    "best kept": ("llama", {"train": {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}}),
    "features": ("llama", {"method": "features", "lora": {}}),
    "classify": ("bert", {"task": "classify", "rows": [*LABELED, *LABELED[:3]], "class_weights": "balanced"}),
    "dpo": ("llama", {"objective": "dpo", "rows": [*PREFERENCES, *PREFERENCES[:4]]}),
}  # fmt: skip
DEFAULT_CASES = ("lora",)


@pytest.mark.parametrize(
    "case", [name if name in DEFAULT_CASES else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_two_processes_train_what_one_does(tmp_path: Path, case: str) -> None:
    """Nine rows in batches of four, windows of two: the last window of an epoch has one row, and one process none."""
    kind, changes = CASES[case]
    outs = []
    for processes in (1, 2):
        recipe = recipe_for(tmp_path, processes, **changes)
        outs.append(Path(recipe["out"]))
        assert train_in(processes, recipe, lambda: without_dropout(base_for(kind))) == outs[-1:] * processes
    assert_same_adapter(*outs)
    assert_same_log(*outs)
    assert Adapter.load(outs[1]).record["metrics"]["processes"] == 2
    assert not run_of(outs[1]).exists()


def without_dropout(base: Base) -> Base:
    """Return a base that draws no random numbers: each process would draw its own."""
    for module in base.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return base


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"objective": "kto", "rows": FEEDBACK}, id="kto"),
        pytest.param({"objective": "orpo", "rows": PREFERENCES}, id="orpo"),
        pytest.param({"objective": "dpo", "rows": PREFERENCES, "train": {"loss_type": ["sft"]}}, id="dpo, sft"),
    ],
)
def test_an_objective_whose_loss_is_of_a_whole_batch_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="one loss for all rows of a batch: 2 processes cannot share them"):
        Job.open(load_recipe(recipe_of(tmp_path, **changes)), base_of(), processes=2)


def test_a_dry_run_counts_the_rows_of_all_processes(tmp_path: Path) -> None:
    def run() -> tuple[int, int, int, int]:
        found = plan(recipe_for(tmp_path, 2), base=base_of())
        return found.steps.batch, found.steps.micro_batch, found.steps.processes, found.measured.tokens

    first, second = in_processes(run)
    assert first == second
    assert first[:3] == (8, 2, 2)
    alone = plan(recipe_for(tmp_path, 1), base=base_of())
    assert first[3] == alone.measured.tokens


# Stopping and resuming


def long_for(folder: Path, processes: int, **changes: Any) -> dict[str, Any]:
    section = {"save_steps": 2, "train_sampling_strategy": "random", **changes.pop("train", {})}
    return recipe_for(folder, processes, steps=6, train=section, **changes)


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """With dropout, which every process draws for itself."""
    whole = long_for(tmp_path, 2, out="whole", lora=DROPOUT)
    assert train_in(2, whole) == [Path(whole["out"])] * 2
    recipe = long_for(tmp_path, 2, out="killed", lora=DROPOUT)
    lost, killed = train_in(2, recipe, base_of, At(5, lambda _: die() if get_rank() == 1 else None))
    assert killed == -signal.SIGKILL
    assert isinstance(lost, StorageError)
    assert "one of the 2 processes was lost" in str(lost)
    assert f"resumes from the checkpoint of step 4 in {run_of(Path(recipe['out']))}" in str(lost)
    assert train_in(2, recipe) == [Path(recipe["out"])] * 2
    assert results(Path(recipe["out"])) == results(Path(whole["out"]))


def test_a_checkpoint_of_two_processes_continues_in_one_with_as_many_rows(tmp_path: Path) -> None:
    alone, two = long_for(tmp_path, 1, out="alone"), long_for(tmp_path, 2, out="resumed")
    assert train_in(1, alone) == [Path(alone["out"])]
    train_in(2, two, base_of, At(5, lambda _: die() if get_rank() == 1 else None))
    (fewer,) = train_in(1, two)
    assert isinstance(fewer, RecipeError)
    assert "rows of a step was 8, is 4" in str(fewer)
    copy = tmp_path / "copy.run"
    shutil.copytree(run_of(Path(two["out"])), copy)
    again = long_for(
        tmp_path, 1, out="resumed", train={"gradient_accumulation_steps": 1, "per_device_train_batch_size": 8}
    )
    assert train_in(1, again) == [Path(again["out"])]
    assert_same_adapter(Path(alone["out"]), Path(again["out"]))


def test_a_signal_to_one_process_stops_all_with_one_checkpoint(tmp_path: Path) -> None:
    recipe = long_for(tmp_path, 2, train={"save_steps": 100})
    stop = At(3, lambda _: os.kill(os.getpid(), signal.SIGTERM) if get_rank() == 1 else None)
    assert train_in(2, recipe, base_of, stop) == [143, 143]
    (checkpoint,) = RunFolder(recipe["out"]).list_complete()
    assert checkpoint.step == 4


# Failures


def test_memory_that_runs_out_in_one_process_halves_its_rows_alone(tmp_path: Path) -> None:
    plain, halved = recipe_for(tmp_path, 2, out="plain"), recipe_for(tmp_path, 2, out="halved")
    assert train_in(2, plain) == [Path(plain["out"])] * 2

    def narrow_in_second() -> Base:
        base = base_of()
        layer = base.model.model.layers[1]

        def fail(module: nn.Module, given: Any, options: dict[str, Any]) -> None:
            if get_rank() == 1 and module.training and len(given[0]) > 1:
                device_is_full()

        layer.register_forward_pre_hook(fail, with_kwargs=True)
        return base

    assert train_in(2, halved, narrow_in_second) == [Path(halved["out"])] * 2
    assert_same_adapter(Path(plain["out"]), Path(halved["out"]))
    log = [json.loads(line) for line in (Path(halved["out"]) / "metrics.jsonl").read_text().splitlines()]
    assert [line["micro_batch"] for line in log if "micro_batch" in line] == [1]


def test_an_error_of_one_process_is_that_of_all_and_reported_once(tmp_path: Path) -> None:
    counter = itertools.count()

    def fail(_: Any) -> None:
        if get_rank() == 1:
            raise VerificationError(f"this is wrong {next(counter)}")

    def work() -> Any:
        try:
            train(long_for(tmp_path, 2), base=base_of(), callbacks=[At(3, fail)])
        except VerificationError as error:
            return str(error), getattr(error, REPORTED_ELSEWHERE, False)

    found = in_processes(work)
    assert [message for message, _ in found] == ["this is wrong 0"] * 2
    assert [elsewhere for _, elsewhere in found] == [False, True]


def test_an_output_that_another_run_writes_is_an_error_of_all(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, 2)
    with lock_output(run_of(Path(recipe["out"]))):
        for error in train_in(2, recipe):
            assert isinstance(error, StorageError)
            assert "another process is writing" in str(error)


def test_a_process_that_is_slow_to_look_is_told_the_error_of_the_first() -> None:
    """The first has the store, and may not end before all have read there why."""

    def fail() -> None:
        with join_world() as world:
            if world.is_first:
                raise RecipeError("the recipe is wrong")
            time.sleep(1)
            world.meet()

    assert [str(error) for error in in_processes(fail)] == ["the recipe is wrong"] * 2


def test_rows_that_differ_between_processes_are_refused(tmp_path: Path) -> None:
    folders = [tmp_path / str(rank) for rank in (0, 1)]
    for folder in folders:
        folder.mkdir()
    recipes = [
        recipe_for(folder, 2, rows=ROWS[rank:]) | {"out": str(tmp_path / "out")} for rank, folder in enumerate(folders)
    ]
    for error in in_processes(lambda: train(recipes[get_rank()], base=base_of())):
        assert isinstance(error, RecipeError)
        assert "process 1 has another recipe, other rows or another base" in str(error)


# The launcher


@pytest.mark.slow
def test_torchrun_trains_with_one_output_and_one_report(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, 2) | {"base": "kit-base", "dtype": "fp32"}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = launch(2, "-m", "lora_kit", "train", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written") == 1
    assert done.stderr.count("step 3 of 3") == 1
    again = launch(2, "-m", "lora_kit", "train", "recipe.yaml", cwd=tmp_path)
    assert again.stderr.count("exists already") == 1
    assert again.stderr.count("exitcode  : 3") == 2


# A base of which each process has a part


def compare_sharded(folder: Path, *, processes: int, log_within: float = 1e-5, **changes: Any) -> None:
    """Train kit-base in some processes, and sharded in two, and compare what they write."""
    outs = []
    for name, size, section in (("whole", processes, {}), ("sharded", 2, {"fsdp": "full_shard"})):
        recipe = recipe_for(folder, size, out=name, train={"max_steps": 2, **section}, **changes)
        outs.append(Path(recipe["out"]))
        work = partial(train, recipe | {"base": "kit-base", "dtype": "fp32"})
        assert in_processes(lambda work=work: work().out, size=size) == outs[-1:] * size
    assert_same_adapter(*outs)
    assert_same_log(*outs, within=log_within)
    one, two = (Adapter.load(out).record["base"] for out in outs)
    assert one == two
    assert isinstance(one, dict)
    assert one["weights"]


def test_a_sharded_base_trains_the_same_adapter_with_the_same_fingerprint(tmp_path: Path) -> None:
    """The second step has one row, and one process none."""
    compare_sharded(tmp_path, processes=1)


@pytest.mark.slow
def test_a_quantized_base_is_sharded_as_well(tmp_path: Path) -> None:
    """Beside as many processes without shards: bitsandbytes computes batches of other sizes in another way.

    Where the processor has bf16 instructions it evaluates whole weights in bf16, and never those of a sharded base.
    """
    pytest.importorskip("bitsandbytes")
    compare_sharded(tmp_path, processes=2, quantize="nf4", log_within=1e-2)


def test_each_process_keeps_its_part_of_a_sharded_base() -> None:
    def work() -> tuple[int, int]:
        with join_world():
            model = base_of().model.requires_grad_(False)
            whole = count_own_bytes(model)
            shard_base(model)
            return whole, count_own_bytes(model)

    for whole, own in in_processes(work):
        assert own <= 0.6 * whole


SHARDED = {"train": {"fsdp": "full_shard"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"fsdp": "half"}}, "train.fsdp .half. is not known"),
        ({"method": "full", **SHARDED}, "train.fsdp shards a frozen base; method full changes it"),
        ({"objective": "dpo", **SHARDED}, "train.fsdp does not go with objective dpo"),
        ({"compile": True, **SHARDED}, "compile and train.fsdp do not go together"),
        ({"train": {"deepspeed": "zero3.json"}}, "stored by columns, as lora_B is; train.fsdp"),
        (SHARDED, "shards the base over several processes; there is one"),
    ],
)
def test_a_way_to_share_the_base_that_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        train(recipe_of(tmp_path, **changes), base=base_of())
