"""`list`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_kit.cli.app import ADAPTERS, AsJson, app
from lora_kit.cli.output import console, metrics, number, print_json, print_table, size
from lora_kit.errors import listed
from lora_kit.io.text import harmless

if TYPE_CHECKING:
    pass


@app.command(name="list")
def list_(store: Path = ADAPTERS, /, *, json: AsJson = False) -> None:
    """List the adapters of a store, broken ones too.

    Args:
        store: Folder that holds one folder per adapter.
    """
    from lora_kit.adapter.store import list_adapters

    found = list_adapters(store)
    if json:
        print_json([summary.to_json() for summary in found])
        return
    rows = [
        (
            summary.name,
            number(summary.rank),
            number(summary.alpha),
            listed(sorted({target.rpartition(".")[2] for target in summary.targets})),
            summary.base or "",
            size(summary.bytes),
            metrics(summary.metrics),
            summary.digest[:12],
            f"broken: {summary.problem}" if summary.problem else "good",
        )
        for summary in found
    ]
    print_table(("adapter", "rank", "alpha", "targets", "base", "size", "metrics", "digest", "state"), rows)
    if not found:
        console().print(f"no adapters in {harmless(str(store))}")
