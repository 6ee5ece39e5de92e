"""`demo`."""

from __future__ import annotations

from pathlib import Path

from lora_kit.cli.app import app


@app.command
def demo(*, out: Path = Path("runs/demo"), seed: int = 0) -> None:
    """Train three small adapters, then compare, swap, mix and merge them.

    Example: lora-kit demo

    Args:
        out: Folder to write.
        seed: Seed of data and training.
    """
    from lora_kit.demo.demo import run

    run(out=out, seed=seed)
