"""`check`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_kit.cli.app import Allow, AsJson, Store, app
from lora_kit.cli.export import BaseOption, MaxRankOption, TargetOption
from lora_kit.cli.next_steps import build_command, build_flags, build_loading_flags, print_next
from lora_kit.cli.output import print_json, print_table
from lora_kit.names import DEFAULT_STORE

if TYPE_CHECKING:
    from lora_kit.exporters.export import Verdict


@app.command
def check(
    adapter: str,
    /,
    *,
    target: TargetOption,
    base: BaseOption = None,
    max_lora_rank: MaxRankOption = None,
    allow: Allow = None,
    store: Store = DEFAULT_STORE,
    json: AsJson = False,
) -> None:
    """Check in advance whether another program can load an adapter.

    Exit code 2 if it cannot.

    Example: lora-kit check pirate --target vllm

    Args:
        adapter: A folder, a name in the store, or a hub id.
    """
    from lora_kit.adapter.store import find_adapter
    from lora_kit.exporters.export import check as run

    verdict = run(find_adapter(adapter, store=store), target, base=base, max_lora_rank=max_lora_rank, allow=allow or ())
    if json:
        print_json({**verdict.to_json(), "fits": not verdict.refused})
    else:
        print_table(("", ""), _format_verdict(verdict))
    verdict.demand()
    if not json:
        flags = [*build_loading_flags(base, allow, store), *build_flags("max-lora-rank", max_lora_rank)]
        flags += build_flags("target", target)
        print_next([build_command("export", adapter, *flags, "--out", Path("exported", Path(adapter).name))])


def _format_verdict(verdict: Verdict) -> list[tuple[str, str]]:
    """Return the rows of the table: what the reader cannot take, what an export changes, what it needs."""
    rows = [("reader", verdict.reader), ("fits", "no" if verdict.refused else "yes")]
    rows += [("unsupported", reason) for reason in verdict.refused]
    rows += [("export changes", change) for change in verdict.changed]
    return rows + [("needs", need) for need in verdict.needed]
