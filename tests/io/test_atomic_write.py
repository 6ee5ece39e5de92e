"""Saving is all or nothing: killed, interrupted or out of space at any call, the old adapter is there or the new."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lora_kit as lk
from lora_kit.adapter.folder import CONFIG, WEIGHTS
from lora_kit.errors import StorageError
from lora_kit.io import atomic_write
from tests.support import folders
from tests.support.processes import RAISED, REFUSED, SAVED, at_call, die, full, in_child

OLD, NEW = folders.adapter(seed=1), folders.adapter(seed=2)
STEP = 1 if os.environ.get("LORA_KIT_LONG") == "1" else 3


def interrupt() -> None:
    raise KeyboardInterrupt


def endings(target: Path, act: Callable[[], None], *, step: int = STEP, **how: Any) -> Iterator[tuple[int, int]]:
    """Save NEW once for every so many calls that saving makes, acting at that call: its number, and how it ended."""
    for number in itertools.count(1, step):

        def work(number: int = number) -> None:
            at_call(number, act, below=target.parent)
            NEW.save(target, **how)

        ending = in_child(work)
        yield number, ending
        if number > 200:
            pytest.fail("saving makes more calls than it can")
        if ending == SAVED and not reaches(target, number, how):
            return


def reaches(target: Path, number: int, how: dict[str, Any]) -> bool:
    """Whether a whole save makes as many calls as that."""
    reset(target, there=bool(how))
    marker = target.parent.with_name("marker")
    marker.unlink(missing_ok=True)

    def work() -> None:
        at_call(number, lambda: os.mkdir(marker), below=target.parent)
        NEW.save(target, **how)

    in_child(work)
    reached = marker.exists()
    if reached:
        marker.rmdir()
    reset(target, there=bool(how))
    return reached


def reset(target: Path, *, there: bool) -> None:
    shutil.rmtree(target.parent)
    target.parent.mkdir()
    if there:
        OLD.save(target)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """An adapter folder, alone in its store."""
    (tmp_path / "store").mkdir()
    OLD.save(tmp_path / "store" / "x")
    return tmp_path / "store" / "x"


def alone(target: Path) -> bool:
    return os.listdir(target.parent) == [target.name]


def test_a_save_killed_at_any_call_leaves_the_old_adapter_or_the_new_one(target: Path) -> None:
    seen = set()
    for _number, ending in endings(target, die, replace=True):
        assert ending in (SAVED, -signal.SIGKILL)
        seen.add(lk.Adapter.load(target).digest)
        assert lk.Adapter.load(target).digest in (OLD.digest, NEW.digest)
        OLD.save(target, replace=True)
        assert alone(target)
        assert lk.Adapter.load(target) == OLD
    assert seen == {OLD.digest, NEW.digest}


def test_a_first_save_killed_at_any_call_leaves_nothing_or_all(target: Path) -> None:
    shutil.rmtree(target)
    seen = set()
    for _number, _ending in endings(target, die):
        seen.add(target.exists())
        assert not target.exists() or lk.Adapter.load(target) == NEW
        OLD.save(target, replace=True)
        assert alone(target)
        shutil.rmtree(target)
    assert seen == {True, False}


@pytest.mark.slow
def test_where_folders_cannot_be_exchanged_the_next_save_puts_the_old_one_back(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_write, "_exchange", atomic_write._exchange_in_two)
    missing = 0
    for _number, _ending in endings(target, die, step=1, replace=True):  # only few calls stand between the two moves
        missing += not target.exists()
        with pytest.raises(StorageError, match="exists already"):
            NEW.save(target)
        assert lk.Adapter.load(target).digest in (OLD.digest, NEW.digest)
        OLD.save(target, replace=True)
        assert alone(target)
    assert missing


@pytest.mark.parametrize("exchange", ["_exchange", "_exchange_in_two"])
@pytest.mark.parametrize("act", [full, interrupt])
def test_a_save_that_fails_at_any_call_leaves_the_old_adapter_and_nothing_else(
    target: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None], exchange: str
) -> None:
    monkeypatch.setattr(atomic_write, "_exchange", getattr(atomic_write, exchange))
    failed = 0
    for number, ending in endings(target, act, replace=True):
        found = lk.Adapter.load(target)
        if act is interrupt:
            assert ending in (SAVED, RAISED)
            assert found.digest in (OLD.digest, NEW.digest)
        else:
            assert ending in (SAVED, REFUSED), number
            assert found == (NEW if ending == SAVED else OLD), number
        if ending == REFUSED:
            failed += 1
            # Who cannot lock the file cannot know that nobody else did, and leaves it.
            assert set(os.listdir(target.parent)) <= {"x", ".x.lock"}, number
        OLD.save(target, replace=True)
        assert alone(target)
    assert failed or act is interrupt


def test_a_first_save_that_fails_leaves_not_even_the_folders_above(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "x"

    def work() -> None:
        at_call(12, full, below=tmp_path)
        NEW.save(deep)

    assert in_child(work) == REFUSED
    assert os.listdir(tmp_path) == []


def test_a_file_size_limit_is_of_the_machine_and_says_what_is_needed(target: Path) -> None:
    said, write = os.pipe()

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        try:
            NEW.save(target, replace=True)
        except StorageError as error:
            os.write(write, str(error).encode())
            raise

    assert in_child(work) == REFUSED
    told = os.read(said, 2_000).decode()
    assert "File too large" in told
    assert "bytes are needed" in told
    assert str(target) in told
    assert lk.Adapter.load(target) == OLD
    assert alone(target)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_refuses_in_mid_write_is_told_with_the_bytes_needed(
    target: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def write_bytes(path: Path, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data[:100])
        if path.name == WEIGHTS:
            raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_bytes)
        with pytest.raises(StorageError, match=os.strerror(code)) as caught:
            NEW.save(target, replace=True)
    assert caught.value.exit_code == 3
    assert ("bytes are needed" in str(caught.value)) == (code != errno.EIO)
    assert lk.Adapter.load(target) == OLD
    assert alone(target)


def test_a_disk_without_room_is_refused_before_anything_is_written(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(target)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match=r"needs [\d,]+ bytes; 100 are free"):
        NEW.save(target, replace=True)
    assert lk.Adapter.load(target) == OLD
    assert alone(target)


@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder that any user may look into, and only its owner may write."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.parametrize("place", ["x", "below/x", "there"])
def test_a_folder_that_may_not_be_written_is_of_the_machine(readable: Path, place: str) -> None:
    OLD.save(readable / "there")
    os.chmod(readable, 0o555)
    said, write = os.pipe()

    def work() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)  # nobody: root may write anywhere
        try:
            NEW.save(readable / place, replace=True)
        except StorageError as error:
            os.write(write, str(error).encode())
            raise

    assert in_child(work) == REFUSED
    assert "cannot be written: Permission denied" in os.read(said, 2_000).decode()
    assert os.listdir(readable) == ["there"]
    assert lk.Adapter.load(readable / "there") == OLD
    os.chmod(readable, 0o755)


def test_a_folder_that_may_not_be_read_is_of_the_machine(readable: Path) -> None:
    OLD.save(readable / "x")
    for hidden in (readable / "x" / WEIGHTS, readable / "x" / CONFIG, readable / "x"):
        os.chmod(hidden, 0)

        def work() -> None:
            if os.geteuid() == 0:
                os.setuid(65534)
            lk.Adapter.load(readable / "x")

        assert in_child(work) == REFUSED, hidden
        os.chmod(hidden, 0o755)


# What is there already


def test_an_output_that_exists_is_refused_unless_it_is_an_adapter_to_replace(target: Path) -> None:
    before = folders.contents(target)
    with pytest.raises(StorageError, match="exists already") as caught:
        NEW.save(target)
    assert caught.value.exit_code == 3
    assert "replace=True in Python, --replace on the command line" in caught.value.hint
    assert folders.contents(target) == before
    NEW.save(target, replace=True)
    assert lk.Adapter.load(target) == NEW
    assert alone(target)


def test_replacing_takes_everything_of_the_old_adapter_away(target: Path) -> None:
    OLD.save(target, files={"loss.png": b"old", "recipe.yaml": b"old"}, replace=True)
    NEW.save(target, files={"recipe.yaml": b"new"}, replace=True)
    assert "loss.png" not in folders.contents(target)
    assert folders.contents(target)["recipe.yaml"] == b"new"


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "other folder", "fifo", "root", "nul", "too long"])
def test_what_is_no_adapter_is_never_replaced(target: Path, kind: str, replace: bool) -> None:
    out = target.with_name("out")
    if kind == "file":
        out.write_text("mine")
    elif kind in ("link", "dangling link"):
        out.symlink_to(target if kind == "link" else "nowhere")
    elif kind == "other folder":
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    elif kind == "fifo":
        os.mkfifo(out)
    else:
        out = {"root": Path("/"), "nul": target.with_name("a\0b"), "too long": target.with_name("x" * 300)}[kind]
    before = os.listdir(target.parent)
    with pytest.raises(StorageError) as caught:
        NEW.save(out, replace=replace)
    assert str(caught.value).isprintable()
    assert os.listdir(target.parent) == before
    assert lk.Adapter.load(target) == OLD
    if kind == "other folder":
        assert (out / "thesis.txt").read_text() == "mine"


def test_an_empty_folder_is_written_into(target: Path) -> None:
    target.with_name("out").mkdir()
    assert lk.Adapter.load(NEW.save(target.with_name("out"))) == NEW


def test_what_appears_while_writing_is_not_overwritten(target: Path) -> None:
    out = target.with_name("out")

    def race() -> None:
        with atomic_write.stage_folder(out) as staging:
            (staging / "a").write_text("ours")
            out.mkdir()
            (out / "thesis.txt").write_text("mine")

    with pytest.raises(StorageError, match="exists already"):
        race()
    assert folders.contents(out) == {"thesis.txt": b"mine"}
    assert sorted(os.listdir(target.parent)) == ["out", "x"]


def test_a_link_in_the_place_of_the_staging_folder_leads_nowhere(target: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    for suffix in ("staging", "replaced"):
        target.with_name(f".x.{suffix}").symlink_to(mine)
    NEW.save(target, replace=True)
    assert lk.Adapter.load(target) == NEW
    assert (mine / "thesis.txt").read_text() == "mine"
    target.with_name(".x.lock").symlink_to(mine / "thesis.txt")
    with pytest.raises(StorageError, match="cannot be written"):
        OLD.save(target, replace=True)
    assert (mine / "thesis.txt").read_text() == "mine"


def test_files_and_folder_are_readable_as_the_umask_says(target: Path) -> None:
    before = os.umask(0o027)
    try:
        NEW.save(target, replace=True)
        assert {path.stat().st_mode & 0o777 for path in target.iterdir()} == {0o640}
        assert target.stat().st_mode & 0o777 == 0o750
    finally:
        os.umask(before)


# Others at the same time


def test_of_two_processes_with_one_output_the_second_is_told(target: Path) -> None:
    ready, set_ready = os.pipe()
    child = os.fork()
    if child == 0:
        with atomic_write.stage_folder(target, replace=True):
            os.write(set_ready, b"!")
            time.sleep(30)
        os._exit(0)
    try:
        assert os.read(ready, 1) == b"!"
        with pytest.raises(StorageError, match="another process is writing"):
            NEW.save(target, replace=True)
        OLD.save(target.with_name("y"))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    shutil.rmtree(target.with_name("y"))
    assert lk.Adapter.load(target) == OLD
    NEW.save(target, replace=True)
    assert lk.Adapter.load(target) == NEW
    assert alone(target)


def test_many_writers_of_one_output_leave_one_whole_adapter(target: Path) -> None:
    children = []
    for seed in range(4):
        child = os.fork()
        if child == 0:
            for _ in range(5):
                with contextlib.suppress(StorageError):
                    folders.adapter(seed=seed).save(target, replace=True)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert lk.Adapter.load(target).digest in {folders.adapter(seed=seed).digest for seed in range(4)}
    assert alone(target)


def test_a_reader_sees_the_old_adapter_or_the_new_one_while_it_is_replaced(target: Path) -> None:
    child = os.fork()
    if child == 0:
        for number in range(1_000_000):
            (OLD, NEW)[number % 2].save(target, replace=True)
    seen = set()
    try:
        for _ in range(150):
            seen.add(lk.Adapter.load(target).digest)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert seen == {OLD.digest, NEW.digest}


def test_a_locale_without_unicode_saves_and_reads_any_name(tmp_path: Path) -> None:
    code = (
        "import sys, lora_kit as lk\nfrom tests.support import folders\n"
        "folder = folders.adapter().save(sys.argv[1])\n"
        "assert lk.Adapter.load(folder) == folders.adapter()\n"
        "try: lk.Adapter.load(sys.argv[1] + chr(223))\n"
        "except lk.errors.AdapterError as error: print(ascii(str(error)))\n"
    )
    name = os.fsencode(tmp_path) + "/ünï-цвет".encode()
    done = subprocess.run(
        [sys.executable, "-c", code, name],
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"is not a folder" in done.stdout
    assert os.path.isdir(name)


@pytest.mark.parametrize("suffix", ["staging", "replaced", "lock"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_not_ours_beside_an_output_is_an_error_that_names_it(target: Path, suffix: str, kind: str) -> None:
    theirs = target.with_name(f".x.{suffix}")
    if kind == "folder":
        theirs.mkdir()
        (theirs / "thesis.txt").write_text("mine")
    else:
        theirs.write_text("mine")
    before = folders.contents(target.parent)
    with pytest.raises(StorageError, match=rf"\.x\.{suffix}|cannot be written"):
        NEW.save(target, replace=True)
    assert folders.contents(target.parent) == before
    shutil.rmtree(theirs) if kind == "folder" else theirs.unlink()
    NEW.save(target, replace=True)
    assert alone(target)


def test_a_file_in_the_place_of_a_folder_is_named_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(StorageError, match=r"cannot be written: .*/file is a file, not a folder"):
        atomic_write.check_output(tmp_path / "file" / "deep" / "out", replace=True)
