"""`python -m tools.fuzz --minutes 20`: bytes without end for everything that reads files of others.

Guided by coverage where atheris is installed (`pip install atheris`), else by chance: cases are made from the kept ones
in `tests/faults/corpus` and from valid files. A case is a fault where a reader raises what is no error of ours, takes
more than five seconds, takes more than a gigabyte, or writes a message that nobody would read. Faults are written below
`--out` and printed; the exit status is 1 if there are any.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Final

from benchmarks import harness

CORPUS: Final = Path(__file__).resolve().parents[1] / "tests" / "faults" / "corpus"
RESULT: Final = harness.RESULTS / "fuzzing.json"
MAX_SECONDS: Final = 5
MAX_BYTES: Final = 2**30
"""Of memory beyond what the process has when it begins."""
MAX_LENGTH: Final = 4096
"""Bytes of a case that is made; kept ones may be longer."""


class _TooSlowError(BaseException):
    """A reader took too long; no `except Exception` of a reader catches it."""


def main() -> int:
    """Fuzz the readers that are named, or all of them, each in a process of its own."""
    guide = _import_guide()
    with guide.instrument_imports(include=["lora_kit", "yaml"]) if guide else contextlib.nullcontext():
        from tools.fuzz_readers import READERS
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20, help="of computing, for all readers together")
    parser.add_argument("--only", nargs="+", choices=list(READERS), default=list(READERS), help="readers, by name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz-faults"), help="folder of the cases that are faults")
    parser.add_argument(
        "--write",
        action="store_true",
        help=f"write the counts to {RESULT.name}; of a part of the readers beside those that are there",
    )
    arguments = parser.parse_args()
    seconds = arguments.minutes * 60 / len(arguments.only)
    has_faults = False
    for name in arguments.only:
        record = _fuzz_in_child(name, seconds, arguments.seed, arguments.out)
        has_faults |= bool(record["faults"])
        if arguments.write:
            _write(record, list(READERS))
    return int(has_faults)


def _write(record: dict[str, object], names: list[str]) -> None:
    """Write the counts of a reader beside what the others gave before."""
    earlier = json.loads(RESULT.read_text(encoding="utf-8"))["readers"] if RESULT.is_file() else []
    counts = {one["reader"]: one for one in [*earlier, record]}
    result = {**harness.environment(), "readers": [counts[name] for name in names if name in counts]}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _fuzz_in_child(name: str, seconds: float, seed: int, out: Path) -> dict[str, object]:
    """Fuzz one reader in a process, and again while it dies before its time; print and return what came of it."""
    context = multiprocessing.get_context("fork")  # with what is imported and instrumented already
    spent, cases, outcomes, guided = 0.0, 0, Counter[str](), False
    while spent < seconds:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            report = Path(folder) / "report.json"
            child = context.Process(target=_fuzz, args=(name, seconds - spent, seed, out, Path(folder)))
            child.start()
            child.join()
            found = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
        if child.exitcode != 0:
            outcomes[f"fault died with {child.exitcode}"] += 1
        cases, guided, seed = cases + found.get("cases", 0), found.get("guided", guided), seed + 1
        spent += max(found.get("seconds", 0.0), 1.0)
        outcomes.update(found.get("outcomes", {}))
    faults = sum(count for outcome, count in outcomes.items() if outcome.startswith("fault"))
    record: dict[str, object] = {"reader": name, "cases": cases, "seconds": round(spent), "guided": guided}
    record |= {"faults": faults, "outcomes": dict(outcomes.most_common())}
    print(f"{name}: {cases:,} cases, {faults} faults, {dict(outcomes.most_common(8))}", flush=True)
    return record


class _Run:
    """The cases of one process.

    Attributes:
        outcomes: how often each came about.
    """

    def __init__(self, name: str, read: Callable[[bytes], str], out: Path) -> None:
        self.outcomes = Counter[str]()
        self._name, self._read, self._out = name, read, out
        self._peak = _peak_memory()

    def try_case(self, data: bytes) -> str:
        """Read a case, write it down where it is a fault, and return the outcome."""
        # Of computing: the machine may be busy with something else.
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        signal.alarm(12 * MAX_SECONDS)
        try:
            outcome = self._read(data)
        except _TooSlowError:
            outcome = self._keep(data, "slow")
        except Exception as error:
            outcome = self._keep(data, type(error).__name__)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
        if _peak_memory() - self._peak > MAX_BYTES:
            self._peak = _peak_memory()
            outcome = self._keep(data, "memory")
        self.outcomes[outcome] += 1
        return outcome

    def _keep(self, data: bytes, kind: str) -> str:
        """Write down a case that is a fault, the first few of each place in the code, and return its outcome."""
        frames = traceback.extract_tb(sys.exc_info()[2])
        where = f"{Path(frames[-1].filename).name}-{frames[-1].lineno}" if frames else "none"
        outcome = f"fault {kind} {where}"
        if self.outcomes[outcome] < 3:
            folder = self._out / self._name.replace(" ", "-")
            folder.mkdir(parents=True, exist_ok=True)
            case = folder / f"{kind}-{where}-{hashlib.sha256(data).hexdigest()[:8]}"
            case.write_bytes(data)
            print(f"{self._name}: {outcome}: {case}\n{traceback.format_exc(limit=-4)}", flush=True)
        return outcome


def _fuzz(name: str, seconds: float, seed: int, out: Path, folder: Path) -> None:
    """Fuzz one reader for some seconds of computing, and write a report. Runs in a process of its own, and ends it."""
    from tools.fuzz_readers import open_reader

    guide = _import_guide()
    signal.signal(signal.SIGALRM, _raise_too_slow)
    signal.signal(signal.SIGPROF, _raise_too_slow)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seeds = [path.read_bytes() for path in sorted((CORPUS / name.replace(" ", "-")).iterdir())]
    with open_reader(name, folder) as read:
        for data in seeds:  # what is imported on the way counts for no case
            with contextlib.suppress(Exception):
                read(data)
        run, started = _Run(name, read, out), time.process_time()

        def try_case(data: bytes) -> None:
            outcome, spent = run.try_case(data), time.process_time() - started
            if spent > seconds or run.outcomes.total() % 100 == 1 or outcome.startswith("fault"):
                values = {"cases": run.outcomes.total(), "outcomes": run.outcomes, "seconds": spent}
                (folder / "report.json").write_text(json.dumps({**values, "guided": bool(guide)}), encoding="utf-8")
            if spent > seconds:
                os._exit(0)  # nothing else ends the loop of libFuzzer well

        for data in seeds:
            try_case(data)
        if guide is None:
            for data in mutate_forever(seeds, random.Random(seed)):
                try_case(data)
        _follow_guide(guide, try_case, seeds, folder / "corpus", seed)


def _follow_guide(  # type: ignore[no-untyped-def]
    guide, try_case: Callable[[bytes], None], seeds: list[bytes], corpus: Path, seed: int
) -> None:
    """Let atheris choose the cases."""
    corpus.mkdir()
    for number, data in enumerate(seeds):
        (corpus / str(number)).write_bytes(data)
    limits = [f"-max_len={MAX_LENGTH}", "-timeout=0", "-rss_limit_mb=0", "-verbosity=0"]
    guide.Setup(["fuzz", *limits, f"-seed={seed + 1}", str(corpus)], try_case)
    guide.Fuzz()


def _import_guide():  # type: ignore[no-untyped-def]
    """Return atheris, or None where it is not installed."""
    try:
        return importlib.import_module("atheris")
    except ImportError:
        return None


def _raise_too_slow(number: int, frame: FrameType | None) -> None:
    raise _TooSlowError


def _peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def mutate_forever(seeds: list[bytes], chance: random.Random) -> Iterator[bytes]:
    """Yield cases: seeds that are cut, repeated, swapped, with other bytes or a piece of another seed in them."""
    while True:
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.choice((1, 1, 2, 4, 8))):
            _mutate(data, seeds, chance)
        yield bytes(data[: 4 * MAX_LENGTH])


_WORDS: Final = (b'"', b"{", b"}", b"[", b"]", b":", b",", b"\n", b"\0", b"\xff", b"null", b"true", b"-1",
                 b"1e999", b"0.5", b"NaN", b"9" * 30, b"\\ud800", b"&a ",
                 b"*a ", b"!!int ", b"<<: ", b"- ", b"  ", b"\t", b"#", b"\xef\xbb\xbf")  # fmt: skip


def _mutate(data: bytearray, seeds: list[bytes], chance: random.Random) -> None:
    """Change one thing in place."""
    start = chance.randrange(len(data) + 1)
    end = min(len(data), start + chance.choice((1, 1, 2, 4, 16, 64)))
    kind = chance.randrange(6)
    if kind == 0 and start < len(data):
        data[start] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del data[start:end]
    elif kind == 2:
        data[start:start] = chance.choice(_WORDS)
    elif kind == 3:
        data[start:end] = data[start:end] * chance.choice((2, 3, 50))
    elif kind == 4:
        other = chance.choice(seeds)
        place = chance.randrange(len(other) + 1)
        data[start:end] = other[place : place + chance.choice((4, 16, 64))]
    else:
        data[start:end] = chance.randbytes(end - start)


if __name__ == "__main__":
    sys.exit(main())
