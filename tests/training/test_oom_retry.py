"""Memory that runs out within a step: the same step again with fewer rows at once, and the same gradient."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kit.adapter.adapter import Adapter
from lora_kit.cli.main import main
from lora_kit.errors import StorageError
from lora_kit.torch_utils import is_out_of_memory
from lora_kit.training.results import TrainReport
from lora_kit.training.train import train
from tests.support.interrupted import SignalAt, die_at, killed, results
from tests.support.long_runs import take_few
from tests.support.memory import device_is_full, narrow
from tests.support.training import LABELED, PAIRS, At, base_of, recipe_of, same_state, state

ROWS = [*PAIRS, {"prompt": "g", "completion": "hi"}, {"prompt": "jk", "completion": "l"}]


def allocate_too_much(*_: Any) -> None:
    torch.empty(2**50)


def recipe(folder: Path, *, out: str, size: int = 4, accumulation: int = 2, **changes: Any) -> dict[str, Any]:
    section = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "logging_steps": 1,
               "train_sampling_strategy": "sequential", **changes.pop("train", {})}  # fmt: skip
    return recipe_of(folder, rows=ROWS, train=section, out=str(folder / out), **changes)


def lines_of(report: TrainReport) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (report.out / "metrics.jsonl").read_text().splitlines()]


def losses_of(report: TrainReport) -> list[float]:
    """Loss and gradient norm of every step."""
    return [line[key] for line in lines_of(report) if "loss" in line for key in ("loss", "grad_norm")]


@pytest.mark.parametrize("fail", [device_is_full, allocate_too_much])
@pytest.mark.parametrize("calls", take_few([0, 1, 3], 1))
def test_the_step_is_done_again_with_half_the_rows_and_the_same_gradient(
    tmp_path: Path, fail: Callable[..., None], calls: int, caplog: pytest.LogCaptureFixture
) -> None:
    # Windows of 4 + 3 rows: plain gradient descent, so that the weights are the gradients.
    section = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    plain = train(recipe(tmp_path, out="plain", train=section), base=base_of())
    base = narrow("llama", 2, fail, calls=calls)()
    before = state(base.model)
    halved = train(recipe(tmp_path, out="halved", train=section), base=base)
    assert losses_of(halved) == pytest.approx(losses_of(plain), abs=1e-6)
    found = Adapter.load(halved.out).tensors
    for key, tensor in Adapter.load(plain.out).tensors.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6)
    assert halved.steps == plain.steps
    assert halved.tokens == plain.tokens
    assert same_state(base.model, before)
    said = [message for message in caplog.messages if "memory ran out" in message]
    assert len(said) == 1
    assert "it is repeated with 2 rows at once (accumulation 4)" in said[0]


def test_it_is_said_in_the_log_and_in_the_record(tmp_path: Path) -> None:
    report = train(recipe(tmp_path, out="out"), base=narrow("llama", 2, calls=2)())
    (line,) = [line for line in lines_of(report) if "micro_batch" in line]
    assert {**line, "time": None} == {"step": 2, "micro_batch": 2, "accumulation": 4, "time": None}
    assert report.micro_batch == 2
    assert Adapter.load(report.out).record["metrics"]["micro_batch"] == 2
    plain = train(recipe(tmp_path, out="plain"), base=base_of())
    assert "micro_batch" not in Adapter.load(plain.out).record["metrics"]


@pytest.mark.slow
def test_from_then_on_it_is_the_run_of_a_recipe_with_half_the_rows(tmp_path: Path) -> None:
    """Dropout's masks too: bit for bit, since the first step already is done again from its beginning."""
    for kind in ("llama", "gpt2"):
        changes: dict[str, Any] = {"lora": {"lora_dropout": 0.2}}
        halved = train(recipe(tmp_path, out=f"halved-{kind}", **changes), base=narrow(kind, 2, calls=1)())
        asked = train(recipe(tmp_path, out=f"asked-{kind}", size=2, accumulation=4, **changes), base=base_of(kind))
        assert results(halved.out)[0] == results(asked.out)[0]
        assert losses_of(halved) == pytest.approx(losses_of(asked), abs=1e-6)  # summed in another order


@pytest.mark.slow
def test_it_halves_again_down_to_one_row(tmp_path: Path) -> None:
    plain = train(recipe(tmp_path, out="plain"), base=base_of())
    halved = train(recipe(tmp_path, out="halved"), base=narrow("llama", 1)())
    assert [line["micro_batch"] for line in lines_of(halved) if "micro_batch" in line] == [2, 1]
    assert losses_of(halved) == pytest.approx(losses_of(plain), abs=1e-5)


@pytest.mark.slow
def test_a_later_halving_and_a_label_per_text(tmp_path: Path) -> None:
    section = {"per_device_train_batch_size": 6, "train_sampling_strategy": "sequential"}
    found = []
    for name in ("plain", "halved"):
        base = base_of("bert", labels=2)
        for module in base.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        layer = base.model.bert.encoder.layer[1]
        seen: list[int] = []

        def count(module: torch.nn.Module, given: Any, seen: list[int] = seen, name: str = name) -> None:
            seen.append(len(given[0]))
            if name == "halved" and module.training and len(given[0]) > (3 if len(seen) < 8 else 2):
                device_is_full()

        layer.register_forward_pre_hook(count)
        again = recipe_of(tmp_path, rows=LABELED, task="classify", train=section, out=str(tmp_path / name))
        found.append(train(again, base=base))
    assert [line["micro_batch"] for line in lines_of(found[1]) if "micro_batch" in line] == [3, 2]
    plain, halved = (Adapter.load(report.out).tensors for report in found)
    for key, tensor in plain.items():
        torch.testing.assert_close(halved[key], tensor, rtol=0, atol=1e-5)


def test_with_one_row_it_is_an_error_that_says_what_helps(tmp_path: Path) -> None:
    base = narrow("llama", 0)()
    before = state(base.model)
    with pytest.raises(StorageError, match="memory ran out with one row at once") as caught:
        train(recipe(tmp_path, out="out"), base=base)
    assert caught.value.exit_code == 3
    for help_ in ("gradient_checkpointing", "max_length", "quantize", "lora.r"):
        assert help_ in caught.value.hint
    assert same_state(base.model, before)
    assert not (tmp_path / "out").exists()


def test_the_command_exits_with_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(tmp_path, out="out", base="kit-base")))
    monkeypatch.setattr("lora_kit.training.loop.trainer.Trainer._forward_and_backward", allocate_too_much)
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 3
    assert "memory ran out with one row at once" in capsys.readouterr().err


def test_memory_that_runs_out_between_the_steps_is_no_traceback_either(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="outside of the forward and backward passes") as caught:
        train(recipe(tmp_path, out="out"), base=base_of(), callbacks=[At(1, device_is_full)])
    assert "adamw_8bit" in caught.value.hint


@pytest.mark.parametrize("stop", take_few(["kill", "signal"], "kill"))
@pytest.mark.slow
def test_resumed_after_a_halving_it_ends_with_the_same_bytes(tmp_path: Path, stop: str) -> None:
    changes: dict[str, Any] = {"lora": {"lora_dropout": 0.2}, "steps": 6, "train": {"save_steps": 2}}
    # The second step is the first that does not fit; after a stop there is room, and still it is done as before.
    made = narrow("llama", 2, calls=2)
    expected = train(recipe(tmp_path, out="unbroken", **changes), base=made())
    again = recipe(tmp_path, out="out", **changes)
    if stop == "kill":
        killed(again, die_at(5), base=made)
    else:
        with pytest.raises(KeyboardInterrupt):
            train(again, base=made(), callbacks=[SignalAt(3, signal.SIGINT)])
    report = train(again, base=base_of())
    assert report.resumed == 4
    assert report.micro_batch == expected.micro_batch == 2
    assert results(report.out) == results(expected.out)


def test_other_errors_are_not_taken_for_it(tmp_path: Path) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        train(recipe(tmp_path, out="out"), base=narrow("llama", 0, broken)())
    assert not is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))
