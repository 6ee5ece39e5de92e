"""Make the adapters that ship with the kit, the golden files of the format: `python -m lora_kit.demo.ship adapters/`.

They fit only the kit-base they were trained on: a new kit-base means making them again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from lora_kit.demo import demo_training
from lora_kit.demo.demo_report import TaskResult
from lora_kit.errors import LoraKitError, VerificationError

EPOCHS: Final = 2
"""Twice what the demo takes: here nobody waits."""
HELD_OUT: Final = 128
MIN_SCORE: Final = 0.9
"""Share of held-out rows that a shipped adapter gets right, at least."""


def ship(
    store: str | Path,
    *,
    scratch: str | Path = Path("runs/ship"),
    steps: Mapping[str, int] = demo_training.STEPS,
    held_out: int = HELD_OUT,
) -> list[TaskResult]:
    """Train the demo's adapters in `scratch` and put them into the store, replacing those that are there.

    Raises:
        VerificationError: one of them is not good enough; the store is as it was.
    """
    base = demo_training.load_demo_base()
    out = Path(scratch)
    results = [*demo_training.train_tasks(base, out=out, seed=0, steps=steps, held_out=held_out, epochs=EPOCHS)]
    poor = [f"{result.task.name} {result.score:.0%}" for result in results if result.score < MIN_SCORE]
    if poor:
        raise VerificationError(
            f"right on held-out rows: {', '.join(poor)}; expected at least {MIN_SCORE:.0%}",
            hint="the store is as it was",
        )
    for result in results:
        demo_training.copy_adapter(result.training.out, Path(store) / result.task.name)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Ship the adapters from the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Make the adapters that ship with the kit.")
    parser.add_argument("store", type=Path, help="folder that gets one folder per task")
    parser.add_argument("--scratch", type=Path, default=Path("runs/ship"), help="where they are trained")
    arguments = parser.parse_args(argv)
    try:
        results = ship(arguments.store, scratch=arguments.scratch)
    except LoraKitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for result in results:
        folder, digest = arguments.store / result.task.name, result.training.digest
        print(f"{folder}: {result.score:.1%} right, {result.bytes:,} bytes, {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
