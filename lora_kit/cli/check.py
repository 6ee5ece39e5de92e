"""`check`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_kit.cli.app import AsJson, Store, app
from lora_kit.cli.output import print_json, print_table
from lora_kit.names import DEFAULT_STORE

if TYPE_CHECKING:
    pass
from lora_kit.cli.export import BaseOption, MaxRankOption, TargetOption, _format_verdict


@app.command
def check(
    adapter: str,
    /,
    *,
    target: TargetOption,
    base: BaseOption = None,
    max_lora_rank: MaxRankOption = None,
    store: Store = DEFAULT_STORE,
    json: AsJson = False,
) -> None:
    """Say in advance whether another program takes an adapter.

    Exit code 2 if it does not.

    Args:
        adapter: A folder, or a name in the store.
    """
    from lora_kit.adapter.store import find_adapter
    from lora_kit.exporters.export import check as run

    found = run(find_adapter(adapter, store=store), target, base=base, max_lora_rank=max_lora_rank)
    if json:
        print_json({**found.to_json(), "fits": not found.refused})
    else:
        print_table(("", ""), _format_verdict(found))
    found.demand()
