"""`resize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_kit.cli.app import AsJson, Replace, Store, app, check_adapter_output
from lora_kit.names import DEFAULT_STORE

if TYPE_CHECKING:
    pass
from lora_kit.cli.combine import _save_and_show


@app.command
def resize(
    adapter: str,
    /,
    *,
    out: Path,
    rank: int | None = None,
    energy: float | None = None,
    bytes: int | None = None,
    replace: Replace = False,
    store: Store = DEFAULT_STORE,
    json: AsJson = False,
) -> None:
    """Bring an adapter to smaller ranks, losing as little as they allow.

    Args:
        adapter: A folder, or a name in the store.
        out: The adapter folder to write.
        rank: Of every layer, at most.
        energy: Share of each update's squared norm to keep, above 0 to 1.
        bytes: Of all tensors, at most.
    """
    from lora_kit.adapter.store import find_adapter
    from lora_kit.algebra.resize import resize as run

    folder = find_adapter(adapter, store=store)
    check_adapter_output(out, replace=replace)
    _save_and_show(run(folder, rank=rank, energy=energy, bytes=bytes), out, replace=replace, json=json)
