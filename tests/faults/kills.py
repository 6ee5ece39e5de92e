"""`python -m tests.faults.kills [--kills 40] [--write]`: work is killed at random moments, looked at, and done again.

Ends with 1 if a result is a mixture of the old one and the new one, or if the second time does not end in the same
bytes as work that nobody disturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

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
        earlier = json.loads(RESULT.read_text(encoding="utf-8"))["works"] if RESULT.is_file() else []
        works = {one["work"]: one for one in [*earlier, *map(asdict, counts)]}
        result = {**harness.environment(), "works": [works[name] for name in KILLED if name in works]}
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        reliability_page.fill()
    return 0 if all(one.is_good for one in counts) else 1


def kill_work(name: str, *, kills: int, seed: int) -> KillCounts:
    """Kill one kind of work at random moments of it, and print and return what came of it."""
    start, chance, counts = KILLED[name], random.Random(f"{name} {seed}"), KillCounts(name)
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        place, ready = Path(folder) / "kill", Path(folder) / "ready"
        place.mkdir()
        code, said = wait_for(fork_work(start(place, 1)))
        assert code == 0, f"the work fails: {said}"
        expected = measure_undisturbed(start, place, ready)
        for number in range(kills):
            put_back(ready, place)
            _kill_once(start, place, chance.uniform(0, expected.seconds), expected, counts)
            if not counts.is_good:
                print(f"{name}: kill {number} of seed {seed} was not survived: {counts}", flush=True)
                break
    print(f"{name}: {counts.kills} kills, {counts.in_the_work} in the work, {counts.mixtures} mixtures, "
          f"{counts.same_bytes} in the same bytes, from {len(expected.decisive)} files", flush=True)  # fmt: skip
    return counts


def _kill_once(start: Start, place: Path, moment: float, expected: Undisturbed, counts: KillCounts) -> None:
    """Kill the work at a moment, look at its result, and do it again."""
    work = start(place, 2)
    child = fork_work(work)
    time.sleep(moment)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child[0], signal.SIGKILL)
    code, said = wait_for(child)
    assert code in (0, -signal.SIGKILL), f"the work failed by itself with {code}: {said}"
    counts.kills += 1
    counts.in_the_work += code != 0
    found = read_result(place)
    is_whole = expected.is_old(found) or expected.is_new(found)
    counts.whole += is_whole
    counts.mixtures += not is_whole
    code, said = wait_for(fork_work(work))
    assert code == 0, f"the work fails when it is done again: {said}"
    counts.same_bytes += expected.is_new(read_result(place))
    counts.leftovers += len(list_leftovers(place))


if __name__ == "__main__":
    sys.exit(main())
