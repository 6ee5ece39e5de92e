"""What do busy processes cost a training, and what does it cost alone that its threads do not spin?

`lora-kit train` of kit-base, alone and beside as many busy processes as there are cores, with each way of waiting. A
way is set by variables of the environment, so that what the command line chooses is measured beside the others: `spin`
is what torch does by itself, `chosen` sets nothing. Ratios are taken within a round: of the seconds of training,
without loading.

    python -m benchmarks.fair_neighbors [--rounds 3] [--steps 100] [--ways spin,chosen] [--write]
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
from typing import Any, Final

from benchmarks.harness import write

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


def run(ways: Sequence[str], *, rounds: int, steps: int) -> dict[str, Any]:
    """Return the seconds of every round by way, alone and beside busy processes."""
    cores = len(os.sched_getaffinity(0))
    seconds: dict[str, dict[str, list[float]]] = {place: {way: [] for way in ways} for place in ("alone", "beside")}
    with tempfile.TemporaryDirectory() as scratch:
        recipe = write_recipe(Path(scratch), steps)
        for number in range(rounds):
            for place, neighbors in (("alone", 0), ("beside", cores)):
                with busy_processes(neighbors):
                    for way in ways if number % 2 == 0 else reversed(ways):
                        seconds[place][way].append(measure(recipe, way))
                        print(f"round {number}: {place}, {way}: {seconds[place][way][-1]:.1f} s", flush=True)
    return {"steps": steps, "busy_processes": cores, "seconds": seconds, "speeds": collect_speeds(seconds)}


def collect_speeds(seconds: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    """Return medians over rounds, by way: the speed alone and that beside busy processes, over `spin` alone."""
    alone, beside = seconds["alone"], seconds["beside"]
    return {
        way: {
            "alone_over_spin": median(a / b for a, b in zip(alone["spin"], alone[way], strict=True)),
            "beside_over_alone": median(a / b for a, b in zip(alone["spin"], beside[way], strict=True)),
        }
        for way in alone
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {', '.join(WAYS)}; spin is always among them")
    parser.add_argument("--write", action="store_true", help="put the result into results/")
    arguments = parser.parse_args()
    ways = ["spin", *(way for way in arguments.ways.split(",") if way != "spin")]
    result = run(ways, rounds=arguments.rounds, steps=arguments.steps)
    for way, speeds in result["speeds"].items():
        print(
            f"{way:<12} alone {speeds['alone_over_spin']:.3f} × spin, beside {speeds['beside_over_alone']:.3f} × alone"
        )
    if arguments.write:
        write(NAME, result)


if __name__ == "__main__":
    main()
