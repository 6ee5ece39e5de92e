"""How many threads torch computes with on a CPU, and how they wait: set before torch is imported, which reads it once.

Threads of OpenMP that wait for the others of a product spin for milliseconds by default. Beside processes that need the
same cores each spin takes time from the thread that is waited for, and a training is slower by much more than its
share. A short spin costs nothing that can be measured alone (`benchmarks/fair_neighbors.py`). The number of threads
decides the last bits of a training, so it follows from what the machine lets this process use, never from its load.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables that set the number of threads."""
WAITING: Final = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
"""Variables that set how threads wait."""
_SPINS: Final = "1000"
"""Turns of a waiting thread's loop before it sleeps; libgomp's own number is 300,000."""
_GROUPS: Final = Path("/sys/fs/cgroup")
_OWN_GROUP: Final = Path("/proc/self/cgroup")
_CORES: Final = Path("/sys/devices/system/cpu")

_chosen: dict[str, str] = {}


def choose_cpu_threads() -> None:
    """Set what the user's environment leaves open, for this process and those that it starts.

    It does nothing once torch is imported: that would be too late.
    """
    if "torch" not in sys.modules:
        _chosen.update(choose_variables(os.environ, cores=count_cores(), quota=read_cpu_quota()))
        os.environ.update(_chosen)


def choose_variables(environment: Mapping[str, str], *, cores: int, quota: float | None) -> dict[str, str]:
    """Return the variables to set.

    Args:
        environment: of the user, which is not overruled.
        cores: that this process may run on.
        quota: processor seconds a second that its container may use; None without a limit.
    """
    variables = {}
    if not any(environment.get(name) for name in WAITING):
        variables["GOMP_SPINCOUNT"] = _SPINS
    # Without a quota torch's own count is right: one thread for each physical core that the process may run on.
    if quota is not None and quota < cores and not any(environment.get(name) for name in THREADS):
        variables["OMP_NUM_THREADS"] = str(max(1, int(quota)))
    return variables


def describe_cpu_threads(threads: int) -> str:
    """Return how torch computes on the CPU, and who decided it, in words.

    Args:
        threads: that torch has.
    """
    plural = "" if threads == 1 else "s"
    return f"{threads} CPU thread{plural} ({_describe(THREADS)}), waiting: {_describe(WAITING)}"


def _describe(names: tuple[str, ...]) -> str:
    values = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not values:
        return "torch's own choice"
    words = [f"{name}={value}" for name, value in values.items()]
    own = all(_chosen.get(name) == value for name, value in values.items())
    return f"{', '.join(words)}, {'chosen by lora-kit' if own else 'from the environment'}"


def count_cores() -> int:
    """Return the number of physical cores that this process may run on: torch computes with a thread on each."""
    allowed = _list_allowed()
    siblings = {frozenset(_read_siblings(number)) or frozenset({number}) for number in allowed}
    return max(1, len(siblings))


def _list_allowed() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _read_siblings(number: int) -> Iterator[int]:
    """Yield the numbers under which the system knows the physical core of a processor."""
    try:
        text = (_CORES / f"cpu{number}/topology/thread_siblings_list").read_text("ascii")
        for part in text.strip().split(","):
            first, _, last = part.partition("-")
            yield from range(int(first), int(last or first) + 1)
    except (OSError, ValueError):
        return


def read_cpu_quota(groups: Path = _GROUPS, own: Path = _OWN_GROUP) -> float | None:
    """Return the processor seconds a second that the control groups of this process allow; None without a limit.

    Args:
        groups: where the system shows control groups, of version 2 or 1.
        own: the file that names those of this process.
    """
    quotas = [quota for folder in _list_groups(groups, own) if (quota := _read_quota(folder)) is not None]
    return min(quotas, default=None)


def _list_groups(groups: Path, own: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups and of all groups above them."""
    yield from (groups, groups / "cpu", groups / "cpu,cpuacct")
    try:
        lines = own.read_text("utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        top = groups / kinds if kinds else groups
        below = top / path.lstrip("/")
        yield from (folder for folder in (below, *below.parents) if folder.is_relative_to(top))


def _read_quota(folder: Path) -> float | None:
    """Return the quota of one control group; None where it has none."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text("ascii").split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text("ascii") for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no limit is "max", or -1
        return None
