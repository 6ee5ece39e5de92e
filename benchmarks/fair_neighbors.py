"""What do busy processes cost a training, and what does it cost alone that its threads do not spin?

`lora-kit train` of kit-base, alone and beside as many busy processes as there are cores, with each way of waiting. A
way is set by variables of the environment, so that what the command line chooses is measured beside the others: `spin`
is what torch does by itself, `chosen` sets nothing. Speeds are those of the training, without loading,
over that of `spin` alone, from medians of rounds in which the ways take turns.

    python -m benchmarks.fair_neighbors [--places alone,beside] [--rounds 3] [--ways spin,chosen] [--write]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.harness import read, write

NAME: Final = "fair_neighbors"
_LIBGOMP_SPINS: Final = "300000"
"""Turns that a waiting thread of libgomp spins where nothing says otherwise."""
WAYS: Final[Mapping[str, Mapping[str, str]]] = {
    "spin": {"GOMP_SPINCOUNT": _LIBGOMP_SPINS},
    "chosen": {},
    "passive": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"},
    "10000 turns": {"GOMP_SPINCOUNT": "10000"},
    "1000 turns": {"GOMP_SPINCOUNT": "1000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
PLACES: Final = {"alone": 0, "beside": len(os.sched_getaffinity(0))}
"""Busy processes."""
_VARIABLES: Final = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
_ANIMALS, _PLACES = ("fox", "owl", "hen", "cat"), ("garden", "forest", "river", "kitchen")


def write_recipe(folder: Path, steps: int) -> Path:
    """Write rows of 60 to 90 tokens and a recipe of `steps` steps of eight."""
    rows = [
        {"prompt": f"{animal} in the {place}", "completion": f" The little {animal} went to the {place}. " * 6}
        for animal in _ANIMALS
        for place in _PLACES
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train = {"max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_strategy": "no"}
    recipe = {"base": "kit-base", "data": str(data), "lora": {"r": 8}, "train": train, "out": str(folder / "out")}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def measure(recipe: Path, way: str) -> float:
    """Return the seconds of a training in a process of its own."""
    clean = {key: value for key, value in os.environ.items() if key not in _VARIABLES}
    command = [sys.executable, "-m", "lora_kit", "train", str(recipe), "--replace"]
    subprocess.run(command, env={**clean, **WAYS[way]}, check=True, capture_output=True)
    summary = (recipe.parent / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return float(json.loads(summary)["seconds"])


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep as many processes busy while the block runs."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(place: str, ways: Sequence[str], *, rounds: int, steps: int) -> dict[str, list[float]]:
    """Return the seconds of every round by way, alone or beside busy processes."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as scratch, busy_processes(PLACES[place]):
        recipe = write_recipe(Path(scratch), steps)
        for number in range(rounds):
            for way in ways if number % 2 == 0 else reversed(ways):
                seconds[way].append(measure(recipe, way))
                print(f"round {number}: {place}, {way}: {seconds[way][-1]:.1f} s", flush=True)
    return seconds


def collect_speeds(seconds: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    """Return, by place and way, the speed over that of `spin` alone: medians of the rounds."""
    first = median(seconds["alone"]["spin"])
    return {place: {way: first / median(times) for way, times in ways.items()} for place, ways in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", default=",".join(PLACES), help="a place that was measured before is kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument("--write", action="store_true", help="put the result into results/")
    arguments = parser.parse_args()
    places, ways = arguments.places.split(","), arguments.ways.split(",")
    before = read(NAME)
    held = before["seconds"] if before.get("steps") == arguments.steps else {}
    seconds = held | {place: run(place, ways, rounds=arguments.rounds, steps=arguments.steps) for place in places}
    speeds = collect_speeds(seconds) if "spin" in seconds.get("alone", {}) else {}
    for place, each in speeds.items():
        print(place, {way: round(speed, 3) for way, speed in each.items()})
    if arguments.write:
        write(NAME, {"steps": arguments.steps, "busy_processes": PLACES, "seconds": seconds, "speeds": speeds})


if __name__ == "__main__":
    main()
