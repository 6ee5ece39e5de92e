"""A sweep is looked at from outside, and goes on with the command that is shown."""

from __future__ import annotations

import itertools
import json
import shlex
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna", reason="optuna is not installed (pip install 'lora-kit[sweep]')")

from lora_kit.cli.main import main
from lora_kit.errors import AdapterError
from lora_kit.io.locks import FileLock
from lora_kit.runs.find_runs import find_runs, find_sweep
from lora_kit.runs.run_status import RunStatus
from lora_kit.runs.sweep_status import SweepStatus, read_sweep_status
from lora_kit.sweeps import worker as working
from lora_kit.sweeps.sweep import sweep
from lora_kit.training.train import train
from tests.support.processes import die, in_child
from tests.support.training import base_of, recipe_of


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a sweep of three trials that was killed in the second."""
    base = base_of()
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    recipe = recipe_of(tmp_path, base=str(tmp_path / "base"))
    count = itertools.count()

    def train_or_die(*arguments: Any, **options: Any) -> Any:
        return die() if next(count) == 1 else train(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(working, "train", train_or_die)
        patch.setattr("lora_kit.sweeps.sweep_report.plot_trials", lambda *_: None)
        over = {"lora.r": [2, 4, 8]}
        assert in_child(lambda: sweep(recipe, over, trials=2, method="random", seed=3)) == -signal.SIGKILL
    return tmp_path / "out.sweep"


def test_a_sweep_is_one_line_and_goes_on_with_the_command_that_is_shown(
    stopped: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_kit.sweeps.sweep_report.plot_trials", lambda *_: None)
    (status,) = find_runs(stopped.parent)
    assert isinstance(status, SweepStatus)
    assert (status.state, status.ended, status.trials, status.metric) == ("stopped", 1, 2, "loss")
    assert main(["runs", str(stopped.parent)]) == 0
    assert "1 of 2 trials" in capsys.readouterr().out
    program, *words = shlex.split(str(status.command).rpartition(" && ")[2])
    assert program == "lora-kit"
    assert main(words) == 0
    done = read_sweep_status(stopped)
    assert (done.state, done.ended, done.command) == ("done", 2, None)
    assert (
        done.best
        == json.loads((stopped / "results.json").read_text())["trials"][
            json.loads((stopped / "results.json").read_text())["best"]
        ]["value"]
    )
    assert {(type(each).__name__, each.state) for each in find_runs(stopped.parent)} == {
        ("RunStatus", "done"),
        ("SweepStatus", "done"),
    }


def test_a_sweep_whose_trial_a_process_has_is_running(stopped: Path) -> None:
    with FileLock(stopped / "locks" / "1").hold():
        assert read_sweep_status(stopped).state == "running"


def test_a_sweep_is_followed_by_its_out_and_by_its_folder(
    stopped: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = stopped.with_name("out")
    trial = stopped / "trials" / "1" / "out"
    (stopped.parent / "r.yaml").write_text(json.dumps({"out": str(out)}))
    for name in (out, stopped, stopped.parent / "r.yaml"):
        assert main(["follow", str(name), "--once"]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"{out} (sweep): stopped, 1 of 2 trials, best loss ")
        assert "to go on: " in shown
    assert main(["follow", str(out)]) == 4
    assert "lora-kit sweep" in capsys.readouterr().err
    assert main(["follow", str(out), "--web"]) == 2
    assert "no trial of" in capsys.readouterr().err
    with FileLock(stopped / "locks" / "1").hold():
        assert main(["follow", str(stopped), "--once"]) == 0
        assert f"{trial}: " in capsys.readouterr().out
        assert main(["follow", str(stopped), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["running"] == [str(trial)]


def test_the_trials_of_a_sweep_are_followed_until_it_ends(
    stopped: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = stopped / "trials" / "1" / "out"
    last = read_sweep_status(stopped)
    running = replace(last, state="running", running=(trial,), command=None)
    gap, done = replace(last, command=None), replace(last, state="done", ended=2)
    sweeps = iter([running, running, running, gap, done])
    run = RunStatus(out=trial, state="not started", progress=None, log=(), checkpoints=(), updated=None)
    log = ({"step": 1, "loss": 2.5},)
    states = ["not started", "starting", "starting", "running", "done", "done"]
    runs = iter([replace(run, state=state, log=log if state != "starting" else ()) for state in states])
    monkeypatch.setattr("lora_kit.runs.sweep_status.read_sweep_status", lambda folder: next(sweeps))
    monkeypatch.setattr("lora_kit.runs.run_status.read_status", lambda out: next(runs))
    monkeypatch.setattr("lora_kit.cli.follow._POLL_SECONDS", 0)
    assert main(["follow", str(stopped)]) == 0
    lines = [
        line.replace(str(stopped.parent), "").partition(", best")[0] for line in capsys.readouterr().out.splitlines()
    ]
    assert lines == [
        "/out (sweep): running, 1 of 2 trials",
        "/out.sweep/trials/1/out: starting",
        "step 1: loss 2.5",
        "/out.sweep/trials/1/out: done",
        "/out (sweep): done, 2 of 2 trials",
    ]


def test_the_out_of_a_sweep_that_has_ended_is_the_training_of_its_best_trial(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = stopped.with_name("out")
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 7}\n')
    assert find_sweep(out) is None
    assert find_sweep(stopped) == stopped
    with FileLock(stopped / "locks" / "1").hold():
        assert find_sweep(out) == stopped
    monkeypatch.chdir(stopped.parent.parent)
    assert find_sweep(Path()) is None


def test_a_damaged_sweep_is_an_error_by_file(stopped: Path) -> None:
    (stopped / "journal.log").write_text("[]\n[]\n")
    with pytest.raises(AdapterError, match=r"journal\.log"):
        read_sweep_status(stopped)
    (stopped / "plan.json").write_text("{}")
    with pytest.raises(AdapterError, match=r"plan\.json"):
        read_sweep_status(stopped)
