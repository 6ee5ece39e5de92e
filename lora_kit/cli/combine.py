"""`combine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lora_kit.cli.app import Adapters, Allow, AsJson, Replace, Store, app
from lora_kit.cli.new_adapter import check_adapter_output, save_and_show
from lora_kit.errors import ConfigError
from lora_kit.names import DEFAULT_STORE

Weights = Annotated[
    list[float], Parameter(negative="", help="Weight of each adapter, in their order; may be negative.")
]


@app.command
def combine(
    *,
    adapter: Adapters,
    weight: Weights,
    out: Path,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    replace: Replace = False,
    allow: Allow = None,
    store: Store = DEFAULT_STORE,
    json: AsJson = False,
) -> None:
    """Combine several adapters, each with a weight, into one.

    The error beside the exact sum is measured and shown.

    Example: lora-kit combine -a pirate -a mood --weight 1 --weight 1 --out adapters/mix

    Args:
        out: The adapter folder to write.
        method: cat (exact; ranks add), svd (nearest of a rank), linear (PEFT's), ties, dare_linear, dare_ties or
            magnitude_prune.
        rank: Rank of the result of svd and the pruning methods.
        density: Share of values that the pruning methods keep.
        seed: Seed of the methods that prune at random.
    """
    from lora_kit.adapter.store import find_adapter
    from lora_kit.algebra.combine import combine as run

    if len(weight) != len(adapter):
        raise ConfigError(f"{len(adapter)} adapters and {len(weight)} weights were given", hint="one --weight for each")
    folders = [find_adapter(name, store=store) for name in adapter]
    check_adapter_output(out, replace=replace, inputs=folders)
    sources = list(zip(folders, weight, strict=True))
    combined = run(sources, method=method, rank=rank, density=density, seed=seed, allow=allow or ())
    save_and_show(combined, out, replace=replace, json=json)
