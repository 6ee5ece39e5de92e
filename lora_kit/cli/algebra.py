"""`combine`, `resize`, `extract` and `compare`: adapters made of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lora_kit.cli.app import ADAPTERS, Adapters, AsJson, Replace, Store, app, check_adapter_output
from lora_kit.cli.merge import bytes_bar
from lora_kit.cli.screen import brief, print_json, print_table, size
from lora_kit.errors import ConfigError

if TYPE_CHECKING:
    from lora_kit.adapter import Adapter
    from lora_kit.merge.algebra import Comparison

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
    store: Store = ADAPTERS,
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
    from lora_kit.inspect import find_adapter
    from lora_kit.merge.algebra import combine as run

    if len(weight) != len(adapter):
        raise ConfigError(f"{len(adapter)} adapters and {len(weight)} weights were given", hint="one --weight for each")
    folders = [find_adapter(name, store=store) for name in adapter]
    check_adapter_output(out, replace=replace)
    parents = list(zip(folders, weight, strict=True))
    made = run(parents, method=method, rank=rank, density=density, seed=seed, allow=allow or ())
    _save(made, out, replace=replace, json=json)


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
    store: Store = ADAPTERS,
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
    from lora_kit.inspect import find_adapter
    from lora_kit.merge.algebra import resize as run

    folder = find_adapter(adapter, store=store)
    check_adapter_output(out, replace=replace)
    _save(run(folder, rank=rank, energy=energy, bytes=bytes), out, replace=replace, json=json)


@app.command
def extract(
    *,
    base: str,
    tuned: str,
    out: Path,
    rank: int | None = None,
    energy: float | None = None,
    others: str = "list",
    replace: Replace = False,
    json: AsJson = False,
) -> None:
    """Make an adapter of what a full fine-tune has changed in its base.

    Args:
        base: Hub id, local folder or kit-base.
        tuned: The fine-tune of it: hub id or local folder.
        out: The adapter folder to write.
        rank: Of every pair, at most.
        energy: Share of each difference's squared norm to keep, above 0 to 1.
        others: What becomes of norms, biases and embeddings that differ: list names them and leaves them out, save
            saves them whole.
    """
    from lora_kit.merge.algebra import extract as run

    check_adapter_output(out, replace=replace)
    with bytes_bar("comparing") as progress:
        made = run(base, tuned, rank=rank, energy=energy, others=others, progress=progress)
    _save(made, out, replace=replace, json=json)


def _save(made: Adapter, out: Path, *, replace: bool, json: bool) -> None:
    from lora_kit.inspect import folder_bytes

    made.save(out, replace=replace)
    told: Any = made.record["made"]
    ranks = sorted({pair.a.shape[0] for pair in made.pairs().values()})
    if json:
        print_json({"out": str(out), "digest": made.digest, "ranks": ranks, "bytes": folder_bytes(out), "made": told})
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
        ("size", size(folder_bytes(out))),
    ]
    print_table(("", ""), rows)


@app.command
def compare(one: str, other: str, /, *, allow: Allow = None, store: Store = ADAPTERS, json: AsJson = False) -> None:
    """Show how two adapters of one base are alike.

    Args:
        one: A folder, or a name in the store.
        other: The same.
    """
    from lora_kit.inspect import find_adapter
    from lora_kit.merge.algebra import compare as run

    found = run(find_adapter(one, store=store), find_adapter(other, store=store), allow=allow or ())
    if json:
        print_json(found.to_json())
        return
    print_table(("", ""), _likeness(found, one, other))
    print_table(
        ("layer", "cosine", "inputs", "outputs", "‖delta‖", ""),
        [
            (
                path,
                f"{like.cosine:+.3f}",
                f"{like.inputs:.3f}",
                f"{like.outputs:.3f}",
                *(f"{n:.4g}" for n in like.norms),
            )
            for path, like in found.layers.items()
        ],
    )
    print_table(("field", one, other), [(name, brief(a), brief(b)) for name, (a, b) in found.configs.items()])


def _likeness(found: Comparison, one: str, other: str) -> list[tuple[str, str]]:
    rows = [("cosine of all updates", f"{found.cosine:+.4f}"), ("layers of both", str(len(found.layers)))]
    rows += [
        (f"only in {name}", ", ".join(paths)) for name, paths in zip((one, other), found.alone, strict=True) if paths
    ]
    return rows + [(f"{key}, saved whole", how) for key, how in found.saved.items()]
