"""The folder of a run's checkpoints: what is not ours stays, what is torn is passed over, a full disk is said."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_kit.errors import AdapterError, LoraKitError, StorageError
from lora_kit.training.loop.checkpoints import LOOP, MARKER, RunFolder
from lora_kit.training.loop.resumable import _save_state
from tests.support.folders import contents
from tests.support.processes import at_call, die, in_child

RUN: dict[str, Any] = {"best": None, "finished": False, "identity": {"seed": 0}, "setting": {"torch": "2"}}


def fill(folder: Path) -> None:
    (folder / LOOP).write_bytes(b"state")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "m")
    for step in (2, 4):
        run.write(fill, keep=None, step=step, **RUN)
    return run


def resumed(run: RunFolder) -> int:
    checkpoint = run.find_resumable(RUN["identity"], RUN["setting"], replace=False)
    return checkpoint.step if checkpoint else 0


WRITERS: dict[str, Callable[[Path], Any]] = {
    "safetensors": lambda folder: save_file({"w": torch.zeros(1_000)}, folder / "weights.safetensors"),
    "torch": lambda folder: _save_state({"w": torch.zeros(1_000)}, folder / "optimizer.pt"),
    "text": lambda folder: (folder / "trainer_state.json").write_text("x" * 4_000),
    "the marker": lambda folder: [(folder / f"{number:0250}").touch() for number in range(20)],
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_fills_in_a_checkpoint_is_of_the_machine_and_the_run_goes_on_after(
    run: RunFolder, writer: str
) -> None:
    before, (told, write) = contents(run.folder), os.pipe()

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        try:
            run.write(WRITERS[writer], keep=None, needed=4_000, step=6, **RUN)
        except StorageError as error:
            os.write(write, str(error).encode())
            os._exit(error.exit_code)

    assert in_child(work) == 3
    message = os.read(told, 2_000).decode()
    assert "checkpoint-6 cannot be written: File too large; 4,000 bytes are needed" in message
    assert contents(run.folder) == before
    assert resumed(run) == 4
    run.write(WRITERS[writer], keep=None, needed=4_000, step=6, **RUN)
    assert resumed(run) == 6


def test_a_checkpoint_that_does_not_fit_is_refused_before_it_is_written(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 0, 1_000))  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match="needs 4,000 bytes; 1,000 are free"):
        run.write(fill, keep=None, needed=4_000, step=6, **RUN)


def test_an_error_that_is_none_of_the_disk_stays_what_it_is(run: RunFolder) -> None:
    def fail(folder: Path) -> None:
        try:
            raise OSError(errno.ENOENT, "absent")
        except OSError:
            raise RuntimeError("a fault") from None

    with pytest.raises(RuntimeError, match="a fault"):
        run.write(fail, keep=None, step=6, **RUN)


def test_what_no_checkpoint_of_ours_is_stays(run: RunFolder, tmp_path: Path) -> None:
    (run.folder / "notes-checkpoint-1.txt").write_text("mine")
    (run.folder / "checkpoint-3.txt").write_text("mine")
    theirs = run.folder / "checkpoint-3"
    theirs.mkdir()
    (theirs / "model.safetensors").write_text("mine")
    with pytest.raises(StorageError, match="checkpoint-3 is not a checkpoint of lora_kit"):
        resumed(run)
    with pytest.raises(StorageError, match="holds something else"):
        run.write(fill, keep=None, step=3, **RUN)
    run.write(fill, keep=1, step=6, **RUN)
    run.remove()
    assert sorted(contents(run.folder)) == [
        "checkpoint-3.txt",
        "checkpoint-3/model.safetensors",
        "notes-checkpoint-1.txt",
    ]


def test_checkpoints_whose_removal_is_killed_anywhere_are_in_nobodys_way(tmp_path: Path) -> None:
    def write_all(folder: Path) -> None:
        for name in ("adapter_config.json", "a.bin", LOOP, "z.bin"):
            (folder / name).touch()

    ends = []
    for number in itertools.count(1):
        run = RunFolder(tmp_path / f"m{number}")
        run.write(write_all, keep=None, step=2, **RUN)

        def work(run: RunFolder = run, number: int = number) -> None:
            at_call(number, die, below=run.path(2))
            run.remove()

        ends.append(in_child(work))
        assert resumed(run) in ((0, 2) if number < 3 else (0,))
        run.remove()
        assert not run.folder.exists() or not list(run.folder.iterdir())
        if ends[-1] != -signal.SIGKILL:
            break
    assert len(ends) > 5
    assert ends[-1] == 0


@pytest.mark.parametrize("kind", ["FIFO", "file", "link", "link to nowhere"])
def test_what_is_no_folder_is_passed_over_and_set_aside(
    run: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    place = run.folder / "checkpoint-8"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / MARKER).write_text("mine")
    if kind == "FIFO":
        os.mkfifo(place)
    elif kind == "file":
        place.write_text("mine")
    else:
        place.symlink_to(tmp_path / ("mine" if kind == "link" else "nowhere"))
    assert resumed(run) == 4
    assert "checkpoint-8 is passed over: it is not a folder" in caplog.text
    run.write(fill, keep=None, step=8, **RUN)
    assert resumed(run) == 8
    run.remove()
    assert os.listdir(run.folder) == ["checkpoint-8.set-aside-1"]
    assert (tmp_path / "mine" / MARKER).read_text() == "mine"


@pytest.mark.parametrize("field", ["step", "best", "finished", "identity", "setting", "files", "format"])
@pytest.mark.parametrize("value", ["4", 4.5, [4], None])
def test_a_field_of_another_kind_is_damage(run: RunFolder, field: str, value: Any) -> None:
    from lora_kit.io.sealed_json import NO_DIGEST, SELF_DIGEST, seal_json

    marker = run.path(4) / MARKER
    record = {**json.loads(marker.read_text()), field: value, SELF_DIGEST: NO_DIGEST}
    marker.write_text(seal_json(json.dumps(record, indent=2, sort_keys=True)))
    if (field, value) == ("best", None):
        assert resumed(run) == 4
        return
    with pytest.raises(AdapterError, match=r"damaged|has format"):
        run.read(4)
    assert resumed(run) == 2


def test_a_file_of_a_checkpoint_that_is_a_fifo_is_torn(run: RunFolder) -> None:
    (run.path(4) / LOOP).unlink()
    os.mkfifo(run.path(4) / LOOP)
    assert resumed(run) == 2


def test_one_flipped_bit_in_any_byte_of_a_checkpoint_is_seen(run: RunFolder) -> None:
    for name, data in contents(run.path(4)).items():
        for position in range(len(data)):
            flipped = bytearray(data)
            flipped[position] ^= 1 << (position % 8)
            (run.path(4) / name).write_bytes(flipped)
            with pytest.raises(LoraKitError):
                run.read(4)
        (run.path(4) / name).write_bytes(data)
    assert run.read(4).step == 4


def test_what_a_dead_process_left_goes_with_the_run(run: RunFolder) -> None:
    def work() -> None:
        run.write(lambda folder: os._exit(9), keep=None, step=6, **RUN)

    assert in_child(work) == 9
    assert (run.folder / ".checkpoint-6.staging").is_dir()
    run.remove()
    assert not run.folder.exists()
