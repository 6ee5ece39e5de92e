"""Writing a file is all or nothing, and the next write of it takes away what a process that died has left beside it."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
import threading
from pathlib import Path

import pytest

from lora_kit.errors import StorageError
from lora_kit.io import atomic_write
from lora_kit.io.atomic_write import stage_file, write_file, write_files
from lora_kit.io.output_lock import is_staging_file
from lora_kit.runs.run_files import PROGRESS_FILE, RunProgress, remove_run_files
from lora_kit.training.loop import run_log
from tests.support.processes import REFUSED, SAVED, at_call, die, full, in_child

OLD, NEW = b"old " * 99, b"new, and longer " * 99


@pytest.fixture
def target(tmp_path: Path) -> Path:
    target = tmp_path / "m.jsonl"
    target.write_bytes(OLD)
    return target


def test_a_write_killed_at_any_call_leaves_the_old_file_or_the_new_and_the_next_takes_the_rest_away(
    target: Path,
) -> None:
    seen, left = set(), 0
    for number in itertools.count(1):
        target.write_bytes(OLD)

        def work(number: int = number) -> None:
            at_call(number, die, below=target.parent)
            write_file(target, NEW)

        ending = in_child(work)
        assert ending in (SAVED, -signal.SIGKILL)
        seen.add(target.read_bytes())
        left += len(os.listdir(target.parent)) > 1
        write_file(target, b"again")
        assert os.listdir(target.parent) == [target.name], number
        if ending == SAVED:
            break
    assert seen == {OLD, NEW}
    assert left > 3


def test_a_write_that_fails_at_any_call_leaves_the_old_file_and_nothing_else(target: Path) -> None:
    ending = REFUSED
    for number in itertools.count(1):

        def work(number: int = number) -> None:
            at_call(number, full, below=target.parent)
            write_file(target, NEW)

        ending = in_child(work)
        if ending == SAVED:
            break
        assert ending == REFUSED
        left = {name for name in os.listdir(target.parent) if name != target.name}
        # Who cannot lock the file, or look at it, leaves it: the next write takes it away.
        assert all(is_staging_file(name, target) for name in left)
        write_file(target, OLD)
        assert os.listdir(target.parent) == [target.name]
    assert target.read_bytes() == NEW


def test_what_another_process_is_writing_and_what_is_somebody_elses_stays(target: Path) -> None:
    others = [f".{target.name}.{ending}" for ending in ("123", "lora_kit-1.txt", "lora_kit-", "staging")]
    others += [".other.jsonl.lora_kit-1", "m.jsonl.lora_kit-1"]
    for name in others:
        target.with_name(name).write_text("mine")
    target.with_name(f".{target.name}.lora_kit-7").mkdir()
    ready, set_ready = os.pipe()
    go, set_go = os.pipe()
    child = os.fork()
    if child == 0:
        with stage_file(target) as staging:
            os.write(set_ready, b"!")
            os.read(go, 1)
            staging.write_bytes(NEW)
        os._exit(0)
    assert os.read(ready, 1) == b"!"
    write_file(target, b"between")
    assert target.read_bytes() == b"between"
    os.write(set_go, b"!")
    assert os.waitpid(child, 0)[1] == 0
    assert target.read_bytes() == NEW
    write_file(target, OLD)
    assert set(os.listdir(target.parent)) == {target.name, f".{target.name}.lora_kit-7", *others}


def test_threads_that_write_one_file_leave_one_whole_content(target: Path) -> None:
    contents = [bytes([65 + number]) * 3_000 for number in range(4)]
    failures: list[StorageError] = []

    def write(data: bytes) -> None:
        try:
            for _ in range(10):
                write_file(target, data)
        except StorageError as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(data,)) for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert target.read_bytes() in contents
    assert os.listdir(target.parent) == [target.name]


def test_a_file_in_a_folder_that_is_not_there_is_an_error_and_makes_none(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file or directory"):
        write_file(tmp_path / "gone" / "m.jsonl", NEW)
    assert os.listdir(tmp_path) == []


def test_the_files_of_a_run_that_was_killed_while_it_wrote_one_go_with_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "m.run"
    folder.mkdir()

    def work() -> None:
        os.replace = lambda *paths: die()
        run_log.write_progress(folder, RunProgress(title="t", run="r", folder="f", processes=1))

    assert in_child(work) == -signal.SIGKILL
    (left,) = os.listdir(folder)
    assert is_staging_file(left, folder / PROGRESS_FILE)
    remove_run_files(folder)
    assert not folder.exists()


def test_a_disk_that_is_full_for_the_second_file_leaves_the_first_as_it_was(target: Path) -> None:
    page = target.with_name("page.html")

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(NEW), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        write_files({target: NEW, page: NEW * 2})

    assert in_child(work) == REFUSED
    assert target.read_bytes() == OLD
    assert os.listdir(target.parent) == [target.name]
    write_files({target: NEW, page: NEW * 2})
    assert (target.read_bytes(), page.read_bytes()) == (NEW, NEW * 2)


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("failing", ["exchange", "sync"])
def test_a_second_file_that_cannot_be_replaced_puts_the_first_back(
    target: Path, monkeypatch: pytest.MonkeyPatch, failing: str, is_there: bool
) -> None:
    if not is_there:
        target.unlink()
    page = target.with_name("page.html")
    page.write_bytes(OLD)
    exchange, sync, calls = atomic_write._try_exchange, atomic_write.sync_folder, itertools.count()

    def refuse(*paths: Path) -> bool:
        if page in paths and next(calls) == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return exchange(*paths)

    def refuse_second(folder: Path) -> None:
        if next(calls) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(folder)

    changed = ("_try_exchange", refuse) if failing == "exchange" else ("sync_folder", refuse_second)
    monkeypatch.setattr(atomic_write, *changed)
    with pytest.raises(StorageError, match=r"page\.html"):
        write_files({target: NEW, page: NEW})
    assert {path.name: path.read_bytes() for path in target.parent.iterdir()} == {
        **({target.name: OLD} if is_there else {}),
        page.name: OLD,
    }


def test_several_files_are_replaced_where_two_cannot_be_exchanged(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_write, "_try_exchange", lambda *paths: False)
    page = target.with_name("page.html")
    page.write_bytes(OLD)
    write_files({target: NEW, page: NEW})
    assert {path.name: path.read_bytes() for path in target.parent.iterdir()} == {target.name: NEW, page.name: NEW}


@pytest.mark.parametrize("order", [1, -1])
def test_a_folder_in_the_place_of_one_file_leaves_the_other_as_it_was(target: Path, order: int) -> None:
    folder = target.with_name("page.html")
    folder.mkdir()
    with pytest.raises(StorageError, match="cannot be written: Is a directory"):
        write_files(dict.fromkeys([target, folder][::order], NEW))
    assert target.read_bytes() == OLD
    assert sorted(os.listdir(target.parent)) == ["m.jsonl", "page.html"]
