"""Make the adapters that ship with the kit, the golden files of the format: `python -m lora_kit.demo.ship adapters/`.

They fit only the kit-base they were trained on: a new kit-base means making them again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from lora_kit.demo import demo_steps
from lora_kit.demo.demo_results import Trained
from lora_kit.errors import LoraKitError, VerificationError

EPOCHS: Final = 2
"""Twice what the demo takes: here nobody waits."""
HELD_OUT: Final = 128
LEAST: Final = 0.9
"""Share of held-out rows a shipped adapter gets right at the least."""


def ship(
    store: str | Path,
    *,
    scratch: str | Path = Path("runs/ship"),
    steps: Mapping[str, int] = demo_steps.STEPS,
    held_out: int = HELD_OUT,
) -> list[Trained]:
    """Train the demo's adapters in `scratch` and put them into the store, replacing those that are there.

    Raises:
        VerificationError: one of them is not good enough; the store is as it was.
    """
    scratch = Path(scratch)
    found_all = demo_steps.train_all(
        demo_steps.load(), out=scratch, seed=0, steps=steps, epochs=EPOCHS, held_out=held_out
    )
    trained = list(found_all)
    poor = [f"{found.task.name} {found.score:.0%}" for found in trained if found.score < LEAST]
    if poor:
        raise VerificationError(
            f"right on held-out rows: {', '.join(poor)}; at least {LEAST:.0%} is wanted", hint="the store is as it was"
        )
    for found in trained:
        demo_steps.copy(found.report.out, Path(store) / found.task.name)
    return trained


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the adapters that ship with the kit.")
    parser.add_argument("store", type=Path, help="folder that gets one folder per task")
    parser.add_argument("--scratch", type=Path, default=Path("runs/ship"), help="where they are trained")
    given = parser.parse_args(argv)
    try:
        trained = ship(given.store, scratch=given.scratch)
    except LoraKitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for found in trained:
        print(f"{given.store / found.task.name}: {found.score:.1%} right, {found.bytes:,} bytes, {found.report.digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
