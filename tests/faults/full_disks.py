"""`python -m tests.faults.full_disks [--only merge] [--write]`: work meets a full disk at every point of its way.

On a small file system (tmpfs, so it needs root) the work is done with room for no page, one page, two … until it is
done; then with room for no further file or folder, one, two …; then with a limit of the size of a file, just below each
size that it writes. Ends with 1 where it does not end with exit code 3 and the earlier result whole, or where the same
work does not finish, in the same bytes, once there is room.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks import harness
from tests.faults import reliability_page
from tests.faults.quiet import hush
from tests.faults.undisturbed import (
    Undisturbed,
    fork_work,
    list_leftovers,
    measure_undisturbed,
    put_back,
    read_result,
    wait_for,
)
from tests.support.merging import contents
from tests.support.works import FILLED, Start

RESULT: Final = harness.RESULTS / "full_disks.json"
_PAGE: Final = resource.getpagesize()
_ROOM: Final = 512 * 2**20
_FILES: Final = 100_000
_MOST_POINTS: Final = 2_000
_ENOUGH: Final = 3
"""Times in a row that a work is done: one that goes on without its log is done once, and not with more room."""
_STORAGE: Final = 3


@dataclass
class DiskCounts:
    """What came of one work on a full disk.

    Attributes:
        work: its name.
        pages: points at which there was no further page.
        names: points at which there was no further file or folder.
        sizes: points at which a file could not grow further.
        errors: points at which it ended with a StorageError.
        anyway: points at which it finished all the same: what could not be written is not its result.
        finished: errors after which the same work finished in the same bytes once there was room.
        lost: what went wrong, in words.
    """

    work: str
    pages: int = 0
    names: int = 0
    sizes: int = 0
    errors: int = 0
    anyway: int = 0
    finished: int = 0
    lost: list[str] = field(default_factory=list)


class _SmallDisk:
    """A tmpfs whose room can be changed.

    Attributes:
        folder: where it is mounted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mount("mount", "-t", "tmpfs", "-o", f"size={_ROOM},nr_inodes={_FILES}", "tmpfs", str(folder))

    def leave_room(self, pages: int | None = None, names: int | None = None) -> None:
        """Leave room for so many pages, and so many files and folders; None for plenty."""
        used = os.statvfs(self.folder)
        size = _ROOM if pages is None else (used.f_blocks - used.f_bfree) * used.f_frsize + pages * _PAGE
        inodes = _FILES if names is None else used.f_files - used.f_ffree + names
        options = f"remount,size={max(size, _PAGE)},nr_inodes={inodes}"
        self._mount("mount", "-o", options, str(self.folder))

    def unmount(self) -> None:
        self._mount("umount", str(self.folder))

    @staticmethod
    def _mount(*words: str) -> None:
        subprocess.run(words, check=True, capture_output=True)


@contextlib.contextmanager
def open_small_disk() -> Iterator[_SmallDisk]:
    """Yield a small file system, and remove it."""
    with tempfile.TemporaryDirectory(prefix="disk-") as folder:
        disk = _SmallDisk(Path(folder))
        try:
            yield disk
        finally:
            disk.unmount()


def fill_disk(name: str, *, step: int = 1) -> DiskCounts:
    """Do a work at every point, or at one of so many, at which the disk may be full; return what came of it."""
    start, counts = FILLED[name], DiskCounts(name)
    with open_small_disk() as disk, tempfile.TemporaryDirectory(prefix="ready-") as elsewhere:
        place, ready = disk.folder / "work", Path(elsewhere) / "ready"
        place.mkdir()
        code, said = wait_for(fork_work(start(place, 1)))
        assert code == 0, f"the work fails: {said}"
        expected = measure_undisturbed(start, place, ready)
        case = _Case(start, disk, place, ready, expected, counts)
        counts.pages = case.try_until_done("pages", step, lambda room: lambda: disk.leave_room(pages=room))
        counts.names = case.try_until_done("names", step, lambda room: lambda: disk.leave_room(names=room))
        sizes = sorted({len(data) for data in contents(place).values() if data})
        for size in sizes:
            case.try_point(f"a file of {size - 1} bytes", lambda: None, largest=size - 1)
        counts.sizes = len(sizes)
    return counts


@dataclass(frozen=True)
class _Case:
    """A work that is done on a disk that is full."""

    start: Start
    disk: _SmallDisk
    place: Path
    ready: Path
    expected: Undisturbed
    counts: DiskCounts

    def try_until_done(self, kind: str, step: int, limit: Callable[[int], Callable[[], None]]) -> int:
        """Leave room for more and more until that is enough several times; return how many points there were."""
        enough = 0
        for number, room in enumerate(range(0, _MOST_POINTS, step), start=1):
            enough = enough + 1 if self.try_point(f"{room} {kind}", limit(room)) == 0 else 0
            if enough == _ENOUGH:
                return number
        raise AssertionError(f"{self.counts.work}: no end after {_MOST_POINTS} {kind}")

    def try_point(self, room: str, limit: Callable[[], None], *, largest: int | None = None) -> int:
        """Do the work with little room, look at its result, and do it again with plenty; return the first exit code."""
        put_back(self.ready, self.place)
        work = self.start(self.place, 2)
        limit()
        code, said = wait_for(fork_work(work if largest is None else _limited(work, largest)))
        self.disk.leave_room()
        found = read_result(self.place)
        if code == 0:
            self.counts.anyway += 1
            self._check(self.expected.is_new(found), room, "it is done, and the result is not the new one")
        else:
            self.counts.errors += 1
            self._check(code == _STORAGE, room, f"exit code {code}: {said[-600:]}")
            self._check(self.expected.is_old(found), room, "the earlier result is not whole")
        if code:
            code_again, said = wait_for(fork_work(work))
            is_finished = code_again == 0 and self.expected.is_new(read_result(self.place))
            self.counts.finished += is_finished
            self._check(is_finished, room, f"done again, it ends with {code_again}: {said[-600:]}")
        left = list_leftovers(self.place)
        self._check(not left, room, f"leftovers: {left}")
        return code

    def _check(self, is_good: bool, room: str, what: str) -> None:
        if not is_good:
            self.counts.lost.append(f"room for {room}: {what}")


def _limited(work: Callable[[], Any], largest: int) -> Callable[[], Any]:
    """Return the work with a limit of the size of a file."""

    def limited() -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return work()

    return limited


def main() -> int:
    """Fill the disk for the works that are named, or all of them, and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.full_disks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(FILLED), default=list(FILLED), help="works")
    parser.add_argument("--step", type=int, default=1, help="pages or files from one point to the next")
    parser.add_argument("--write", action="store_true", help="write the counts, and the table of docs/reliability.md")
    arguments = parser.parse_args()
    hush()
    found = []
    for name in arguments.only:
        counts = fill_disk(name, step=arguments.step)
        points = counts.pages + counts.names + counts.sizes
        ends = f"{counts.errors} errors, {counts.anyway} done anyway, {counts.finished} finished"
        print(f"{name}: {points} points, {ends}, {len(counts.lost)} lost", flush=True)
        print("".join(f"  LOST {line}\n" for line in counts.lost[:20]), end="", flush=True)
        found.append(counts)
        if arguments.write:
            _write(counts)
    return 1 if any(counts.lost for counts in found) else 0


def _write(found: DiskCounts) -> None:
    """Write the counts of a work beside what the others gave before."""
    earlier = json.loads(RESULT.read_text(encoding="utf-8"))["works"] if RESULT.is_file() else []
    counts = {one["work"]: one for one in [*earlier, asdict(found)]}
    result = {**harness.environment(), "works": [counts[name] for name in FILLED if name in counts]}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    reliability_page.fill()


if __name__ == "__main__":
    sys.exit(main())
