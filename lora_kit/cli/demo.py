"""`demo`."""

from __future__ import annotations

from pathlib import Path

from lora_kit.cli.app import Replace, app
from lora_kit.cli.next_steps import build_command, build_flags, print_next
from lora_kit.cli.output import print_text


@app.command
def demo(
    *, out: Path = Path("runs/demo"), seed: int = 0, adapters: Path | None = None, replace: Replace = False
) -> None:
    """Train three small adapters, then compare, swap, mix and merge them.

    Example: lora-kit demo

    Args:
        out: Folder to write.
        seed: Seed of data and training.
        adapters: Train nothing: write the three adapters that come with the package into this folder.
    """
    if adapters is not None:
        _write_adapters(adapters, replace=replace)
        return
    from lora_kit.demo.demo import run

    run(out=out, seed=seed)


def _write_adapters(store: Path, *, replace: bool) -> None:
    from lora_kit.demo.shipped_adapters import write_shipped_adapters

    folders = write_shipped_adapters(store, replace=replace)
    names = [f"written: {folder}" for folder in folders]
    print_text("\n".join(names))
    shown = build_flags("adapter", folders[1:])
    prompt = "The boy ran over the hill."
    print_next([build_command("list", store), build_command("generate", *shown, "--compare", "--prompt", prompt)])
