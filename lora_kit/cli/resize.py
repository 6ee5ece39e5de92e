"""`resize`."""

from __future__ import annotations

from pathlib import Path

from lora_kit.cli.app import Allow, AsJson, Replace, Store, app
from lora_kit.cli.new_adapter import check_adapter_output, save_and_show
from lora_kit.names import DEFAULT_STORE


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
    allow: Allow = None,
    store: Store = DEFAULT_STORE,
    json: AsJson = False,
) -> None:
    """Reduce the ranks of an adapter with the smallest possible error.

    Example: lora-kit resize pirate --rank 4 --out adapters/small

    Args:
        adapter: A folder, a name in the store, or a hub id.
        out: The adapter folder to write.
        rank: Rank in every layer, at most.
        energy: Share of each update's squared norm to keep, above 0 to 1.
        bytes: Bytes of all tensors, at most.
    """
    from lora_kit.adapter.store import find_adapter
    from lora_kit.algebra.resize import resize as run

    folder = find_adapter(adapter, store=store)
    check_adapter_output(out, replace=replace, inputs=[folder])
    resized = run(folder, rank=rank, energy=energy, bytes=bytes, allow=allow or ())
    save_and_show(resized, out, replace=replace, json=json)
