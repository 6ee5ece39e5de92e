"""`list`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from lora_kit.cli.app import AsJson, app
from lora_kit.cli.next_steps import build_command, build_loading_flags, print_next
from lora_kit.cli.output import create_console, format_metrics, format_number, format_size, print_json, print_table
from lora_kit.errors import format_list
from lora_kit.io.text import escape_for_terminal
from lora_kit.names import DEFAULT_STORE

_MAX_TARGETS: Final = 4


@app.command(name="list")
def list_(store: Path = DEFAULT_STORE, *, json: AsJson = False, verify: bool = False) -> None:
    """List the adapters of a store, damaged ones too.

    What was read is kept in `.lora_kit_index.json` in the store, so that only adapters whose files changed are read the
    next time.

    Example: lora-kit list

    Args:
        store: Folder that holds one folder per adapter.
        verify: Read every byte, and compare it with the index.
    """
    from lora_kit.adapter.store import list_adapters

    summaries = list_adapters(store, verify=verify)
    if json:
        print_json([summary.to_json() for summary in summaries])
        return
    rows = [
        (
            summary.name,
            format_number(summary.rank),
            format_number(summary.alpha),
            format_list(sorted({target.rpartition(".")[2] for target in summary.targets}), most=_MAX_TARGETS),
            summary.base or "",
            format_size(summary.bytes),
            format_metrics(summary.metrics),
            summary.digest[:12],
            f"broken: {summary.problem}" if summary.problem else "good",
        )
        for summary in summaries
    ]
    header = ("adapter", "rank", "alpha", "targets", "base", "size", "metrics", "digest", "state")
    print_table(header, rows, spare=("digest", "alpha", "targets"))
    if not summaries:
        create_console().print(f"no adapters in {escape_for_terminal(str(store))}")
    good = [summary.name for summary in summaries if not summary.problem]
    print_next([build_command("inspect", good[0], *build_loading_flags(None, None, store))] if good else [])
