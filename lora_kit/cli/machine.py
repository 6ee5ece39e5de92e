"""`demo` and `doctor`."""

from __future__ import annotations

from pathlib import Path

from lora_kit.cli.app import AsJson, app
from lora_kit.cli.screen import print_json, print_table
from lora_kit.errors import VerificationError


@app.command
def demo(*, out: Path = Path("runs/demo"), seed: int = 0) -> None:
    """Train three adapters, compare, swap and merge them.

    Args:
        out: Folder for what it makes.
        seed: Seed of data and training.
    """
    from lora_kit.demo import run

    run(out=out, seed=seed)


@app.command
def doctor(*, json: AsJson = False) -> None:
    """Show versions and devices, and try what should work.

    Exit code 4 if something that should work here does not.
    """
    from lora_kit.doctor import examine

    found = examine()
    if json:
        print_json(found.to_json())
    else:
        print_table(("", ""), list(found.facts.items()))
        checks = [(check.name, check.state, f"{check.seconds:.2f}", check.note) for check in found.checks]
        print_table(("check", "state", "seconds", "note"), checks)
    if found.failed:
        raise VerificationError(f"does not work here: {', '.join(found.failed)}", hint="the table says why")
