"""A training is looked at from outside: its log as it goes, its state, how to go on with it."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_kit.cli.main import main
from lora_kit.errors import AdapterError, LoraKitError, StorageError, UnknownAdapterError, VerificationError
from lora_kit.io.atomic_write import lock_output
from lora_kit.io.locks import FileLock
from lora_kit.io.output_lock import lock_path
from lora_kit.models.loading import Base
from lora_kit.runs.find_runs import find_run, find_runs
from lora_kit.runs.run_files import RunProgress, read_log
from lora_kit.runs.run_page import RunPageServer
from lora_kit.runs.run_status import RunStatus, read_status
from lora_kit.training.loop import run_log
from lora_kit.training.train import train
from tests.support.interrupted import TIMINGS, die_at, killed, long_recipe, results, run_of, unbroken
from tests.support.training import At, base_of

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return long_recipe(tmp_path, train=EVALUATED)


@pytest.fixture
def stopped(recipe: dict[str, Any]) -> dict[str, Any]:
    """A training that was killed in step 5 of 7, with checkpoints of the steps 2 and 4."""
    killed(recipe, die_at(5))
    return recipe


def watch(recipe: dict[str, Any], *steps: int, **options: Any) -> list[RunStatus]:
    """Train, and return the state that another process would have seen at the end of each of some steps."""
    seen: list[RunStatus] = []
    looks = [At(step, lambda _: seen.append(read_status(Path(recipe["out"])))) for step in steps]
    train(recipe, base=base_of(), callbacks=looks, **options)
    return seen


def timeless(log: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in entry.items() if key not in TIMINGS} for entry in log]


# As it goes


def test_a_training_shows_where_it_stands_before_its_first_checkpoint(recipe: dict[str, Any]) -> None:
    (first, late) = watch(recipe, 2, 6)
    assert (first.state, first.steps, first.checkpoints) == ("running", 7, ())
    assert [entry["step"] for entry in first.log] == [0, 1]
    assert first.evaluations[0]["eval_loss"] > 0
    assert first.train_loss == first.log[1]["loss"]
    assert {"loss", "learning_rate", "tokens_per_second", "peak_bytes", "time"} <= set(first.log[1])
    assert late.checkpoints == (2, 4)
    assert late.command is None


def test_the_log_of_the_result_begins_with_the_lines_that_were_there_as_it_went(recipe: dict[str, Any]) -> None:
    (late,) = watch(recipe, 7)
    whole = read_status(Path(recipe["out"]))
    assert (whole.state, whole.step, whole.progress) == ("done", 7, None)
    assert whole.log[: len(late.log)] == late.log
    assert not run_of(Path(recipe["out"])).exists()


def test_a_log_that_is_killed_and_resumed_has_every_line_once(stopped: dict[str, Any]) -> None:
    out = Path(stopped["out"])
    before = read_status(out)
    assert before.state == "stopped"
    assert before.log[-1]["step"] == 4
    # As if the lines of the step after the checkpoint had been written, and a half one.
    with (run_of(out) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 9.0}\n{"step": 6, "lo')
    assert read_status(out).train_loss == 9.0
    (late,) = watch(stopped, 7)
    steps = [(entry["step"], "loss" in entry) for entry in late.log]
    assert len(set(steps)) == len(steps)
    assert timeless(late.log) == timeless(results(out)[1])[: len(late.log)]
    assert results(out) == unbroken(stopped)


def test_metrics_before_training_are_there_once_where_it_evaluates_on_start_too(tmp_path: Path) -> None:
    (late,) = watch(long_recipe(tmp_path, train={**EVALUATED, "eval_on_start": True}), 3)
    assert [entry["step"] for entry in late.evaluations] == [0, 2]


def test_a_log_that_cannot_be_written_is_said_once_and_stops_no_training(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_log, "_append", fail)
        train(recipe, base=base_of())
    assert [text for text in caplog.messages if "cannot be followed" in text] == [
        f"{run_of(Path(recipe['out']))}: the log cannot be followed: [Errno 28] No space left on device"
    ]


def test_a_line_that_was_cut_off_is_replaced_with_the_next_one(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, count = os.write, iter(range(100))

    def cut(descriptor: int, data: bytes) -> int:
        is_log = data.startswith(b'{"step"') and next(count) == 1
        return write(descriptor, data[:7] if is_log else data)

    monkeypatch.setattr(run_log.os, "write", cut)
    (late,) = watch(recipe, 7)
    assert [entry["step"] for entry in late.losses] == [1, 2, 3, 4, 5, 6]


# How it ended


def test_a_run_says_what_ended_it(recipe: dict[str, Any]) -> None:
    def fail(_: object) -> None:
        raise VerificationError("the moon\nwas full")

    with pytest.raises(VerificationError):
        train(recipe, base=base_of(), callbacks=[At(5, fail)])
    assert read_status(Path(recipe["out"])).error == "the moon was full"
    (late,) = watch(recipe, 6)
    assert (late.state, late.error) == ("running", None)


def test_of_a_run_that_fails_before_its_first_checkpoint_nothing_stays(recipe: dict[str, Any]) -> None:
    def fail(_: object) -> None:
        raise VerificationError("no")

    with pytest.raises(VerificationError):
        train(recipe, base=base_of(), callbacks=[At(1, fail)])
    assert not run_of(Path(recipe["out"])).exists()
    assert read_status(Path(recipe["out"])).state == "not started"


def test_a_result_whose_run_folder_was_left_behind_is_done(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_kit.training.loop.checkpoints.RunFolder.remove", lambda self: None)
    train(recipe, base=base_of())
    assert run_of(Path(recipe["out"])).exists()
    assert read_status(Path(recipe["out"])).state == "done"


def test_an_earlier_result_does_not_hide_a_training_that_was_stopped(recipe: dict[str, Any]) -> None:
    train(recipe, base=base_of())
    killed({**recipe, "train": {**recipe["train"], "seed": 1}}, die_at(5), replace=True)
    status = read_status(Path(recipe["out"]))
    assert status.state == "stopped"
    assert str(status.command).endswith(" --replace")


def test_the_command_that_is_shown_goes_on_to_the_same_bytes(
    stopped: dict[str, Any], monkeypatch: pytest.MonkeyPatch, with_tiny_base: None
) -> None:
    command = str(read_status(Path(stopped["out"])).command)
    change, _, rest = command.rpartition(" && ")
    assert change in ("", f"cd {shlex.quote(str(Path.cwd()))}")
    program, *words = shlex.split(rest)
    assert program == "lora-kit"
    assert main(words) == 0
    assert results(Path(stopped["out"])) == unbroken(stopped)


def test_from_another_folder_the_command_goes_to_the_first_one(
    stopped: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path.cwd()
    monkeypatch.chdir(tmp_path)
    assert str(read_status(Path("out")).command).startswith(f"cd {shlex.quote(str(here))} && lora-kit train ")


@pytest.mark.parametrize("file", ["progress.json", "metrics.jsonl"])
def test_damage_is_said_by_file(stopped: dict[str, Any], file: str) -> None:
    path = run_of(Path(stopped["out"])) / file
    for damage in ("[]\n", '{"step": true}\n', "\0\n", '{"step": "1"}\n'):
        path.write_text(damage)
        with pytest.raises(AdapterError, match=file.partition(".")[0]):
            read_status(Path(stopped["out"]))


# Looking disturbs nothing


def test_a_look_writes_nothing(stopped: dict[str, Any], tmp_path: Path) -> None:
    def snapshot() -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*")}

    before = snapshot()
    find_runs(tmp_path)
    assert snapshot() == before


def test_a_training_begins_while_others_look(tmp_path: Path) -> None:
    lock, stop = FileLock(lock_path(tmp_path / "out.run")), threading.Event()

    def look() -> None:
        while not stop.is_set():
            assert lock.is_held in (True, False)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            with lock_output(tmp_path / "out.run"):
                pass
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_second_writer_is_still_told(tmp_path: Path) -> None:
    with lock_output(tmp_path / "out.run"):
        assert FileLock(lock_path(tmp_path / "out.run")).is_held
        with pytest.raises(StorageError, match="another process is writing"), lock_output(tmp_path / "out.run"):
            pass
    assert not FileLock(lock_path(tmp_path / "out.run")).is_held


# Finding them


@pytest.fixture
def with_tiny_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the command line's trainings take the tiny base."""
    from lora_kit.training.job import job

    open_job: Callable[..., Any] = job.Job.open

    def open_tiny(loaded: Any, base: Base | None = None, **options: Any) -> Any:
        return open_job(loaded, base or base_of(), **options)

    monkeypatch.setattr(job.Job, "open", open_tiny)


def test_runs_lists_what_is_running_stopped_and_done(
    stopped: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train({**stopped, "out": str(tmp_path / "deep" / "done")}, base=base_of())
    with lock_output(tmp_path / "begun.run"):
        assert main(["runs", str(tmp_path), "--json"]) == 0
    listed = {
        Path(run["out"]).name: (run["state"], run["step"], run["steps"]) for run in json.loads(capsys.readouterr().out)
    }
    assert listed == {"begun": ("starting", 0, None), "done": ("done", 7, 7), "out": ("stopped", 4, 7)}
    assert main(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"lora-kit train {tmp_path / 'out.run' / 'recipe.yaml'}" in shown
    assert "4 of 7" in shown


def test_a_folder_without_trainings_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert "no training and no sweep under" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["runs", "follow"])
def test_looking_needs_no_torch(stopped: dict[str, Any], tmp_path: Path, verb: str) -> None:
    words = ["runs", str(tmp_path)] if verb == "runs" else ["follow", stopped["out"], "--once"]
    code = f"import sys; from lora_kit.cli import main; assert main({words!r}) == 0; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_is_named_by_recipe_output_run_folder_or_store(
    stopped: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(stopped["out"])
    (tmp_path / "r.yaml").write_text(json.dumps(stopped))
    (tmp_path / "r.toml").write_text(f'base = "x"\nout = "{out}"\n')
    assert [find_run(name) for name in (out, f"{out}.run", tmp_path / "r.yaml", tmp_path / "r.toml")] == [out] * 4
    store = tmp_path / "adapters"
    store.mkdir()
    run_of(out).rename(store / "mine.run")
    monkeypatch.chdir(tmp_path)
    assert find_run("mine") == Path("adapters/mine")
    with pytest.raises(UnknownAdapterError, match="mine") as caught:
        find_run("mime")
    assert "adapters/mine" in str(caught.value)


def test_a_recipe_without_an_output_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("base: x\n")
    assert main(["follow", str(tmp_path / "r.yaml"), "--once"]) == 2
    assert "names no out" in capsys.readouterr().err


# On the terminal and in the browser


def test_follow_prints_the_lines_and_says_that_there_is_no_result(
    stopped: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["follow", stopped["out"]]) == 4
    printed = capsys.readouterr()
    assert "step 4: loss" in printed.out
    assert "step 4: eval_loss" in printed.out
    assert "has no result: its process has ended" in printed.err
    assert "lora-kit train" in printed.err


def test_follow_waits_for_the_training_and_ends_with_it(
    stopped: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    last = read_status(Path(stopped["out"]))
    states = [("not started", 0), ("starting", 0), ("running", 2), ("running", 2), ("running", 5), ("done", 7)]
    seen = iter([replace(last, state=state, log=last.log[:lines]) for state, lines in states])
    monkeypatch.setattr("lora_kit.runs.run_status.read_status", lambda out: next(seen))
    monkeypatch.setattr("lora_kit.cli.follow._POLL_SECONDS", 0)
    assert main(["follow", stopped["out"]]) == 0
    lines = capsys.readouterr().out.splitlines()
    kinds = [line.removeprefix(f"{stopped['out']}: ").partition(" ")[0] for line in lines]
    assert kinds == ["not", "starting", *["step"] * 5, "done", *["step"] * 2]


def test_follow_once_fits_eighty_columns(
    stopped: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(Path(stopped["out"]).parent)
    assert main(["follow", "out", "--once"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "out: stopped, step 4 of 7 (57%)"
    assert max(map(len, lines[:7])) <= 80  # the command after them has a path of any length
    assert [line.split()[0] for line in lines[1:7]] == [
        "training",
        "loss",
        "validation",
        "before",
        "speed",
        "checkpoint",
    ]


def test_follow_as_json_has_the_log(stopped: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["follow", stopped["out"], "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["state"] == "stopped"
    assert [entry["step"] for entry in shown["log"]] == [0, 1, 2, 2, 3, 4, 4]


def test_a_number_that_is_not_finite_is_none(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "eval_perplexity": Infinity}\n')
    assert read_log(tmp_path / "metrics.jsonl") == ({"step": 1, "eval_perplexity": None},)


def ask(server: RunPageServer, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, dict(response.headers), response.read()


def test_the_page_shows_the_state_to_this_machine_only(stopped: dict[str, Any]) -> None:
    with RunPageServer(Path(stopped["out"]), port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            status, headers, page = ask(server, "/")
            assert (status, b"state.json" in page) == (200, True)
            assert "; script-src 'sha256-" in headers["Content-Security-Policy"]
            status, _, body = ask(server, "/state.json")
            assert json.loads(body)["state"] == "stopped"
            assert ask(server, "/state.json", Host="example.org")[0] == 421
            assert ask(server, "/../../etc/passwd")[0] == 404
            (run_of(Path(stopped["out"])) / "progress.json").write_text("{")
            assert "progress.json" in json.loads(ask(server, "/state.json")[2])["error"]
            with pytest.raises(StorageError, match="cannot be used"):
                RunPageServer(Path(stopped["out"]), port=server.server_port)
        finally:
            server.shutdown()


def test_a_long_log_is_thinned_for_the_page_and_keeps_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    lines = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 26))
    (tmp_path / "out" / "metrics.jsonl").write_text(lines)
    monkeypatch.setattr("lora_kit.runs.run_page._MAX_POINTS", 10)
    with RunPageServer(tmp_path / "out", port=0) as server:
        steps = [entry["step"] for entry in json.loads(server.read_state())["log"]]
    assert steps == [1, 4, 7, 10, 13, 16, 19, 22, 25]


def test_time_left_is_that_of_the_steps_of_this_process() -> None:
    progress = RunProgress(title="", run="", folder="", processes=1, step=60, steps=100, first_step=40,
                           started=1000.0, updated=1010.0)  # fmt: skip
    assert progress.seconds_left == 20.0


@pytest.mark.parametrize(
    ("counts", "program"),
    [
        ((1,), "lora-kit train"),
        ((4,), "torchrun --nproc-per-node 4 -m lora_kit train"),
        ((8, 8), "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint FIRST:29500 --rdzv-id sql --nproc-per-node 8 "
                 "-m lora_kit train"),
        ((3, 1), "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint FIRST:29500 --rdzv-id sql "
                 "--nproc-per-node COUNT -m lora_kit train"),
    ],
)  # fmt: skip
def test_the_command_starts_as_many_processes_on_each_machine_as_there_were(
    tmp_path: Path, counts: tuple[int, ...], program: str
) -> None:
    progress = RunProgress(title="", run="", folder=str(Path.cwd()), processes=sum(counts), processes_by_machine=counts)
    status = RunStatus(out=tmp_path / "sql", state="stopped", progress=progress, log=(), checkpoints=(), updated=None)
    assert str(status.command).startswith(f"{program} ")
    assert ("# on each of 2 machines" in str(status.command)) == (len(counts) == 2)
    assert str(status.command).endswith("COUNT is 3, 1") == (counts == (3, 1))


def test_errors_are_of_the_family() -> None:
    with pytest.raises(LoraKitError):
        find_runs(Path("/nowhere/at/all"))
