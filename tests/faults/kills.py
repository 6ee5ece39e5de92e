"""`python -m tests.faults.kills [--kills 40] [--write]`: work is killed at random moments, looked at, and done again.

Ends with 1 if a result is a mixture of the old one and the new one, or if the second time does not end in the same
bytes as work that nobody disturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import harness
from tests.faults import reliability_page
from tests.faults.quiet import hush
from tests.support.merging import contents
from tests.support.works import KILLED, Start

RESULT: Final = harness.RESULTS / "kills.json"


@dataclass
class KillCounts:
    """What came of killing one kind of work.

    Attributes:
        work: its name.
        kills: how many.
        in_the_work: that met the process before it was done.
        whole: after which the result was the old one or the new one.
        mixtures: after which it was neither.
        same_bytes: after which the same work, done again, ended in the bytes of undisturbed work.
        leftovers: staging folders that were there after that.
    """

    work: str
    kills: int = 0
    in_the_work: int = 0
    whole: int = 0
    mixtures: int = 0
    same_bytes: int = 0
    leftovers: int = 0

    @property
    def is_good(self) -> bool:
        return self.whole == self.same_bytes == self.kills and not self.mixtures and not self.leftovers


def main() -> int:
    """Kill the works that are named, or all of them, and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kills", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(KILLED), default=list(KILLED), help="works")
    parser.add_argument("--kills", type=int, default=40, help="of each work")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the counts, and the table of docs/reliability.md")
    arguments = parser.parse_args()
    hush()
    counts = [kill_work(name, kills=arguments.kills, seed=arguments.seed) for name in arguments.only]
    if arguments.write:
        result = {**harness.environment(), "works": [asdict(one) for one in counts]}
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        reliability_page.fill()
    return 0 if all(one.is_good for one in counts) else 1


def kill_work(name: str, *, kills: int, seed: int) -> KillCounts:
    """Kill one kind of work at random moments of it, and print and return what came of it."""
    start, chance, counts = KILLED[name], random.Random(f"{name} {seed}"), KillCounts(name)
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        place, ready = Path(folder) / "kill", Path(folder) / "ready"
        place.mkdir()
        assert _wait(_fork(start(place, 1))) == 0, "the work fails"
        old = contents(place / "out")
        place.rename(ready)  # and copied back under its name, which is in some files
        results = []
        for _ in range(2):
            shutil.copytree(ready, place)
            results.append(_measure(start, place))
            shutil.rmtree(place)
        new, seconds = results[0]
        # What a clock is in differs between works that nobody disturbed, too.
        decisive = [file for file in new if new[file] == results[1][0].get(file)]
        assert any(new[file] != old.get(file) for file in decisive), "the two results have to differ"
        for number in range(kills):
            shutil.copytree(ready, place)
            _kill_once(start, place, chance.uniform(0, seconds), old, new, decisive, counts)
            shutil.rmtree(place)
            if not counts.is_good:
                print(f"{name}: kill {number} of seed {seed} was not survived: {counts}", flush=True)
                break
    print(f"{name}: {counts.kills} kills, {counts.in_the_work} in the work, {counts.mixtures} mixtures, "
          f"{counts.same_bytes} in the same bytes, from {len(decisive)} files", flush=True)  # fmt: skip
    return counts


def _measure(start: Start, place: Path) -> tuple[dict[str, bytes], float]:
    """Do the work undisturbed over an earlier result; return its result, and the seconds that it took."""
    work, began = start(place, 2), time.monotonic()
    assert _wait(_fork(work)) == 0, "the work fails undisturbed"
    return contents(place / "out"), time.monotonic() - began


def _do(work: Callable[[], Any]) -> None:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        work()


def _fork(work: Callable[[], Any]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _do(work)
            code = 0
        except BaseException:
            traceback.print_exc(limit=-3)
        finally:
            os._exit(code)
    return child


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kill_once(
    start: Start,
    place: Path,
    moment: float,
    old: dict[str, bytes],
    new: dict[str, bytes],
    decisive: Collection[str],
    counts: KillCounts,
) -> None:
    """Kill the work at a moment, look at its result, and do it again."""
    work = start(place, 2)
    child = _fork(work)
    time.sleep(moment)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    code = _wait(child)
    assert code in (0, -signal.SIGKILL), f"the work failed by itself with {code}"
    counts.kills += 1
    counts.in_the_work += code != 0
    found = contents(place / "out")
    is_whole = any(_is_same(found, other, decisive) for other in (old, new))
    counts.whole += is_whole
    counts.mixtures += not is_whole
    assert _wait(_fork(work)) == 0, "the work fails when it is done again"
    counts.same_bytes += _is_same(contents(place / "out"), new, decisive)
    counts.leftovers += sum(path.name.endswith((".staging", ".replaced")) for path in place.iterdir())


def _is_same(found: dict[str, bytes], expected: dict[str, bytes], decisive: Collection[str]) -> bool:
    """Return whether two results have files of the same names, and those that decide with the same bytes."""
    return found.keys() == expected.keys() and all(found[file] == expected[file] for file in decisive)


if __name__ == "__main__":
    sys.exit(main())
