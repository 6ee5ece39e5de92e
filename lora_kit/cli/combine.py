"""`combine`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lora_kit.cli.app import Adapters, AsJson, Replace, Store, app, check_adapter_output
from lora_kit.cli.output import format_size, print_json, print_table
from lora_kit.errors import ConfigError
from lora_kit.names import DEFAULT_STORE

if TYPE_CHECKING:
    from lora_kit.adapter.adapter import Adapter

Weights = Annotated[list[float], Parameter(negative="", help="Of each adapter, in their order; may be negative.")]
Allow = Annotated[
    list[str] | None, Parameter(negative="", help="other-base: adapters that were made for different bases.")
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
    """Make one adapter of several, each with a weight.

    How far it is from the exact sum is measured and shown.

    Args:
        out: The adapter folder to write.
        method: cat (exact; ranks add), svd (nearest of a rank), linear (PEFT's), ties, dare_linear, dare_ties or
            magnitude_prune.
        rank: Of svd and the pruning methods.
        density: Share of values that the pruning methods keep.
        seed: Of the methods that prune at random.
    """
    from lora_kit.adapter.store import find_adapter
    from lora_kit.algebra.combine import combine as run

    if len(weight) != len(adapter):
        raise ConfigError(f"{len(adapter)} adapters and {len(weight)} weights were given", hint="one --weight for each")
    folders = [find_adapter(name, store=store) for name in adapter]
    check_adapter_output(out, replace=replace)
    parents = list(zip(folders, weight, strict=True))
    made = run(parents, method=method, rank=rank, density=density, seed=seed, allow=allow or ())
    _save_and_show(made, out, replace=replace, json=json)


def _save_and_show(made: Adapter, out: Path, *, replace: bool, json: bool) -> None:
    from lora_kit.adapter.store import sum_file_sizes

    made.save(out, replace=replace)
    told: Any = made.record["made"]
    ranks = sorted({pair.a.shape[0] for pair in made.pairs().values()})
    if json:
        print_json({"out": str(out), "digest": made.digest, "ranks": ranks, "bytes": sum_file_sizes(out), "made": told})
        return
    error = told["error"]
    meant = "the difference" if told["by"] == "extract" else "what was meant"
    rows = [
        ("adapter", str(out)),
        ("digest", made.digest),
        ("layers", str(len(made.pairs()))),
        ("rank", f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0]) if ranks else "no pairs"),
        ("saved whole", ", ".join(made.saved()) or "none"),
        ("left out", ", ".join(told.get("left_out") or ()) or "nothing"),
        ("error", f"{error['share']:.3g} of {meant}, at most {error['worst']:.3g} in {error['worst_layer'] or 'any'}"),
        ("size", format_size(sum_file_sizes(out))),
    ]
    print_table(("", ""), rows)
