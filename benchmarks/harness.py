"""What every benchmark here shares: cases take turns, ratios are taken within a round, a result says where it was made.

Noise: a machine that is shared changes its speed by tens of per cent within a minute. So the cases of a comparison run
one after the other within a round, a case is divided by the first case of the *same* round, and quoted are the median
of these ratios and their quartiles. The order turns round every other round: no case always follows the same neighbor.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import gc
import json
import logging
import multiprocessing
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal
from unittest.mock import patch

import torch

HERE: Final = Path(__file__).resolve().parent
RESULTS: Final = HERE / "results"
WORK: Final = HERE / "work"
"""What finished runs leave, so that a benchmark that was stopped goes on; not in the repository."""
README: Final = HERE / "README.md"
_LIBRARIES: Final = ("lora-kit", "torch", "transformers", "peft")

# Time


@dataclass(frozen=True)
class Timing:
    """One case of a comparison. Times in seconds.

    Attributes:
        median, fastest, slowest: of its rounds.
        ratio: median over the rounds of its time over the first case's in the same round.
        low, high: quartiles of that ratio: half of the rounds lie between them.
        rounds: how many were measured.
    """

    median: float
    fastest: float
    slowest: float
    ratio: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class Case:
    """A call to time, and what has to be done after it, outside the time."""

    run: Callable[[], Any]
    after: Callable[[], Any]

    def __call__(self) -> Any:
        return self.run()


def alternate(
    cases: Mapping[str, Callable[[], Any]], *, rounds: int, seconds: float = 0.0, warmup: int = 2
) -> dict[str, Timing]:
    """Time cases in turn, A B C, C B A, …; garbage is collected between the rounds, never in a timed call.

    Args:
        cases: the first is what the others are divided by. A `Case` has something to undo after each call.
        rounds: at least this many.
        seconds: go on until this long has passed.
        warmup: rounds before, not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    with _no_collection():
        for _ in range(warmup):
            for run in cases.values():
                seconds_of(run)
        started = time.perf_counter()
        number = 0
        while number < rounds or time.perf_counter() - started < seconds:
            gc.collect()
            for name in list(cases)[:: -1 if number % 2 else 1]:
                times[name].append(seconds_of(cases[name]))
            number += 1
    return timings(times)


def timings(times: Mapping[str, Sequence[float]]) -> dict[str, Timing]:
    """Seconds of each case, round by round, as timings; the first case is what the others are divided by."""
    floor = next(iter(times.values()))
    return {name: _timing(own, floor) for name, own in times.items()}


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Attributes:
        rounds: of each comparison, at least.
        seconds: for each comparison; more rounds are made until they have passed.
        cases: only these; empty: all.
    """

    rounds: int
    seconds: float = 0.0
    cases: tuple[str, ...] = ()

    def of(self, names: Iterable[str]) -> list[str]:
        """The cases to measure. The first one always is: the others are divided by it."""
        return [name for number, name in enumerate(names) if not number or not self.cases or name in self.cases]

    def compare(self, cases: Mapping[str, Callable[[], Any]]) -> dict[str, Timing]:
        """`alternate` with this much effort."""
        wanted = {name: cases[name] for name in self.of(cases)}
        return alternate(wanted, rounds=self.rounds, seconds=self.seconds, warmup=min(2, self.rounds // 3))


@dataclass(frozen=True)
class Row:
    """One line of a result.

    Attributes:
        measure: makes it, as a JSON object: `timings` where cases were compared.
        form: of the suite it belongs to. The full form has the short one's rows too, without those for it only.
        aim: what the ratio of lora_kit should be at most.
    """

    measure: Callable[[Effort], dict[str, Any]]
    form: Literal["short only", "short", "full"] = "full"
    aim: float | None = None


def seconds_of(run: Callable[[], Any]) -> float:
    """Wall time of one call, the work it put on a CUDA device included."""
    _synchronize()
    started = time.perf_counter()
    run()
    _synchronize()
    taken = time.perf_counter() - started
    if isinstance(run, Case):
        run.after()
    return taken


def median_us(run: Callable[[], Any], *, repetitions: int) -> float:
    """Median time of one call in microseconds, after a short warm-up."""
    with _no_collection():
        return statistics.median([seconds_of(run) for _ in range(repetitions + 5)][5:]) * 1e6


def _timing(own: Sequence[float], floor: Sequence[float]) -> Timing:
    ratios = [mine / base for mine, base in zip(own, floor, strict=True)]
    low, ratio, high = quartiles(ratios)
    return Timing(statistics.median(own), min(own), max(own), ratio, low, high, len(own))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; of a single value, that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection inside; what lives already is not looked at by the collections between rounds."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


# Memory

MEMORY_IN_USE: Final = {"MALLOC_MMAP_THRESHOLD_": str(64 * 1024)}
"""For a process whose memory is measured: blocks from 64 KiB on come from the kernel and go back to it when freed. So
resident memory is what is in use, the same within 1 % at every run. By default the allocator keeps some of what was
freed: half as much again, give or take a tenth."""


def peak_bytes(run: Callable[[], Any]) -> int:
    """Highest memory of one call above what was held before it, in bytes.

    On CUDA it is torch's own count of allocated memory. On a CPU it is the kernel's high-water mark of resident memory
    (VmHWM), set back just before through /proc/self/clear_refs: ru_maxrss cannot be set back, and would show what
    loading the model took. Call it inside `in_own_process`, so that nothing another case left behind is reused.
    """
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, field
    return int(found[1]) * 1024


def in_own_process(function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
    """Call a function of a module in a fresh process and return what it returns.

    Args:
        environment: variables set for that process.
    """
    spawn = multiprocessing.get_context("spawn")
    with (
        patch.dict(os.environ, environment or {}),
        concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, initializer=quiet) as pool,
    ):
        return pool.submit(function, *arguments).result()


def quiet() -> None:
    """Warnings and progress of the libraries say nothing here."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


# Results


def environment() -> dict[str, Any]:
    """Versions and the kind of machine; no names."""
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.machine()
    return {
        "versions": {name: version(name) for name in _LIBRARIES},
        "machine": {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads()},
    }


def write(name: str, result: Mapping[str, Any]) -> None:
    """Put a result, with its environment, into `results/`."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**result, **environment()}, indent=2, default=asdict)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def read(name: str) -> dict[str, Any]:
    """A result as written; empty where there is none yet."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def record(name: str, row: str, measured: Mapping[str, Any], *, rows: Iterable[str]) -> None:
    """Put one row of a result into `results/`, beside rows made earlier in the same environment.

    Args:
        rows: those there are, in their order; others made earlier are dropped.
    """
    held = read(name)
    same = all(held.get(key) == value for key, value in environment().items())
    found = {**(held["rows"] if same else {}), row: measured}
    write(name, {"rows": {label: found[label] for label in rows if label in found}})


def fill(page: Path, text: str, *, mark: str) -> None:
    """Write generated text between `<!-- mark: begin -->` and `<!-- mark: end -->` of a page.

    Raises:
        ValueError: the page has no such marks.
    """
    page.write_text(replace_marked(page.read_text(encoding="utf-8"), text, mark=mark), encoding="utf-8")


def replace_marked(page: str, text: str, *, mark: str) -> str:
    """Return the text of a page with generated text between its marks.

    Raises:
        ValueError: the page has no such marks.
    """
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, found, rest = page.partition(begin)
    if not found or end not in rest:
        raise ValueError(f"the page has no place for a generated {mark}: expected {begin} and {end}")
    return f"{before}{begin}\n{text.strip()}\n{end}{rest.partition(end)[2]}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def ratios(rows: Mapping[str, Mapping[str, Any]], cases: Sequence[str]) -> str:
    """Timings, as written, as a table: the time of the first case, and of the others the ratio to it."""
    lines = []
    for name, timings in rows.items():
        cells = [f"{1e3 * timings[cases[0]]['median']:,.0f} ms"]
        lines.append([name, *cells, *(ratio(timings.get(case)) for case in cases[1:])])
    return table(["", *cases], lines)


def ratio(timing: Mapping[str, Any] | None) -> str:
    """`1.13 (1.11–1.16)`: median and quartiles."""
    return f"{timing['ratio']:.2f} ({timing['low']:.2f}–{timing['high']:.2f})" if timing else "–"
