"""A checkpoint is kept as the result of its training: what a training that ended there would have saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_kit.adapter.adapter import Adapter
from lora_kit.cli.main import main
from lora_kit.errors import LoraKitError, StorageError
from lora_kit.io.atomic_write import lock_output
from lora_kit.training.keep import keep
from lora_kit.training.train import train
from tests.support.folders import contents
from tests.support.interrupted import die_at, killed, long_recipe, results, run_of, unbroken
from tests.support.training import LABELED, base_of

CONSTANT = {"lr_scheduler_type": "constant", "warmup_steps": 0, "eval_strategy": "steps", "eval_steps": 1}


def stopped(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the recipe of a training that was killed in step 5 of 7, with checkpoints of steps 2 and 4."""
    recipe = long_recipe(folder, **changes)
    killed(recipe, die_at(5))
    return recipe


def test_it_is_what_a_training_of_so_many_steps_saves(tmp_path: Path) -> None:
    recipe = stopped(tmp_path, train=CONSTANT)
    report = keep(run_of(Path(recipe["out"])))
    shorter = train({**long_recipe(tmp_path, steps=4, train=CONSTANT), "out": str(tmp_path / "four")}, base=base_of())
    kept, whole = Adapter.load(report.out), Adapter.load(shorter.out)
    assert kept == whole
    assert (report.steps, report.planned, report.kept) == (4, 7, 4)
    assert kept.record["checkpoint"] == {"step": 4, "steps": 7}
    metrics = dict(whole.record["metrics"])
    assert dict(kept.record["metrics"]) == metrics
    assert kept.record["base"] == whole.record["base"]
    assert sorted(path.name for path in report.out.iterdir()) == sorted(path.name for path in shorter.out.iterdir())
    assert "at step 4 of 7" in (report.out / "README.md").read_text()
    assert "at step 4 of 7" in (report.out / "report.html").read_text()
    assert (report.trainable, report.parameters) == (shorter.trainable, shorter.parameters)


@pytest.mark.slow
def test_the_training_can_go_on_afterwards_to_the_same_bytes(tmp_path: Path) -> None:
    recipe = stopped(tmp_path)
    expected = unbroken(recipe)
    keep(run_of(Path(recipe["out"])))
    with pytest.raises(StorageError, match="exists already"):
        train(recipe, base=base_of())
    report = train(recipe, base=base_of(), replace=True)
    assert report.resumed == 4
    assert results(report.out) == expected
    assert "checkpoint" not in Adapter.load(report.out).record


def test_the_best_is_kept_where_the_recipe_keeps_it(tmp_path: Path) -> None:
    section = {**CONSTANT, "load_best_model_at_end": True, "eval_steps": 3}
    recipe = stopped(tmp_path, train=section)
    best = json.loads((run_of(Path(recipe["out"])) / "checkpoint-4" / "checkpoint.json").read_text())["best"]
    assert best == 3  # the newest is of step 4, which was not evaluated
    report = keep(run_of(Path(recipe["out"])))
    assert (report.steps, report.kept) == (4, best)
    assert report.after is not None
    assert Adapter.load(report.out) == Adapter.load(run_of(Path(recipe["out"])) / f"checkpoint-{best}")
    assert Adapter.load(report.out).record["metrics"]["best_step"] == best


def test_a_step_and_an_output_may_be_chosen(tmp_path: Path) -> None:
    recipe = stopped(tmp_path)
    report = keep(recipe["out"], step=2, out=tmp_path / "two")
    assert (report.out, report.kept) == (tmp_path / "two", 2)
    assert Adapter.load(tmp_path / "two").record["checkpoint"]["step"] == 2
    with pytest.raises(LoraKitError, match="no whole checkpoint of step 3") as error:
        keep(recipe["out"], step=3)
    assert "4, 2" in error.value.hint
    assert not Path(recipe["out"]).exists()


def test_a_torn_checkpoint_is_passed_over_and_stays(tmp_path: Path) -> None:
    recipe = stopped(tmp_path)
    weights = run_of(Path(recipe["out"])) / "checkpoint-4" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    before = contents(run_of(Path(recipe["out"])))
    assert keep(recipe["out"]).kept == 2
    assert contents(run_of(Path(recipe["out"]))) == before


def test_a_training_that_is_running_is_refused(tmp_path: Path) -> None:
    recipe = stopped(tmp_path)
    run = run_of(Path(recipe["out"]))
    before = contents(run)
    with lock_output(run), pytest.raises(StorageError, match="another process"):
        keep(run)
    assert contents(run) == before
    assert not Path(recipe["out"]).exists()


def test_what_is_at_the_output_is_replaced_only_on_request(tmp_path: Path) -> None:
    recipe = stopped(tmp_path)
    keep(recipe["out"], step=2)
    before = contents(Path(recipe["out"]))
    with pytest.raises(StorageError, match="exists already"):
        keep(recipe["out"])
    assert contents(Path(recipe["out"])) == before
    assert keep(recipe["out"], replace=True).kept == 4


def test_no_run_and_no_adapter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraKitError, match="has no checkpoints"):
        keep(tmp_path / "none.run")
    recipe = long_recipe(tmp_path, method="full", lora={}, train={"save_strategy": "steps"})
    killed(recipe, die_at(5))
    with pytest.raises(LoraKitError, match="holds no adapter") as error:
        keep(recipe["out"])
    assert "the same recipe goes on" in error.value.hint


def test_labels_and_other_types_of_peft_are_kept_too(tmp_path: Path) -> None:
    recipe = long_recipe(tmp_path, task="classify", rows=LABELED)
    killed(recipe, die_at(5), base=lambda: base_of("bert", labels=2))
    assert Adapter.load(keep(recipe["out"]).out).record["labels"] == ["no", "yes"]
    other = {**long_recipe(tmp_path, method="peft", peft={"peft_type": "IA3"}), "out": str(tmp_path / "ia3")}
    other.pop("lora")
    killed(other, die_at(5))
    report = keep(other["out"])
    record = json.loads((report.out / "lora_kit.json").read_text())
    assert record["digest"] == report.digest
    assert (record["peft_type"], record["checkpoint"]["step"]) == ("IA3", 4)


def test_the_command_says_what_it_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = stopped(tmp_path)
    assert main(["keep", f"{recipe['out']}.run"]) == 0
    assert "step 4 of 7" in capsys.readouterr().out
    assert main(["keep", f"{recipe['out']}.run"]) == 3
    assert main(["keep", f"{recipe['out']}.run", "--replace", "--step", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2
    assert main(["keep", str(tmp_path / "none")]) == 2
