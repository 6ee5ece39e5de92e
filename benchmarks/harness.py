"""What every timing here shares: the cases take turns, medians are quoted, and the result says where it was made."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch

RESULTS: Final = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds of one case.

    Attributes:
        median, fastest, slowest: of its rounds.
        ratio: median over the rounds of its time over the first case's in the same round.
    """

    median: float
    fastest: float
    slowest: float
    ratio: float


def alternate(cases: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Time cases in turn, A B C A B C, so that a machine whose speed drifts slows all of them alike.

    Args:
        cases: the first is what the others are compared with.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + warmup):
        for name, run in cases.items():
            started = time.perf_counter()
            run()
            if number >= warmup:
                times[name].append(time.perf_counter() - started)
    floor = times[next(iter(cases))]
    return {
        name: Timing(
            statistics.median(own),
            min(own),
            max(own),
            statistics.median(mine / base for mine, base in zip(own, floor, strict=True)),
        )
        for name, own in times.items()
    }


def median_us(run: Callable[[], Any], *, repetitions: int) -> float:
    """Median time of one call in microseconds, after a short warm-up."""
    times = []
    for _ in range(repetitions + 5):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times[5:]) * 1e6


def environment() -> dict[str, Any]:
    """Versions and the kind of machine; no names."""
    libraries = ("lora-kit", "torch", "transformers", "peft")
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.machine()
    return {
        "versions": {name: version(name) for name in libraries},
        "machine": {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads()},
    }


def write(name: str, result: Mapping[str, Any]) -> None:
    """Put a result, with its environment, into `results/`."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**result, **environment()}, indent=2, default=lambda value: asdict(value))
    (RESULTS / f"{name}.json").write_text(text + "\n")
