"""`inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_kit.cli.app import AsJson, Store, app
from lora_kit.cli.output import abbreviate, format_size, print_json, print_table
from lora_kit.errors import format_list
from lora_kit.names import DEFAULT_STORE

if TYPE_CHECKING:
    from lora_kit.adapter.inspect import Inspection


@app.command
def inspect(adapter: str, /, *, store: Store = DEFAULT_STORE, json: AsJson = False) -> None:
    """Show what an adapter is made of.

    Layers, norms of the deltas and how they are spread over their ranks, size, base, record.

    Args:
        adapter: A folder, a name in the store, or what another tool wrote.
    """
    from lora_kit.adapter.inspect import inspect as run

    found = run(adapter, store=store)
    if json:
        print_json(found.to_json())
        return
    print_table(("", ""), _build_adapter_facts(found))
    print_table(
        ("layer", "kind", "shape", "rank", "effective", "99 % in", "scaling", "‖delta‖"),
        [
            (
                layer.path,
                layer.kind,
                "×".join(map(str, layer.shape)),
                str(layer.rank),
                f"{layer.effective_rank:.1f}",
                str(layer.ranks_for(0.99)),
                f"{layer.scaling:g}",
                f"{layer.norm:.4g}",
            )
            for layer in found.layers
        ],
    )


def _format_token_indices(indices: Sequence[int]) -> str:
    return f"{len(indices):,} tokens: {format_list([str(index) for index in indices])}"


def _build_adapter_facts(found: Inspection) -> list[tuple[str, str]]:
    ranks = sorted({layer.rank for layer in found.layers})
    facts = [
        ("adapter", found.name),
        ("folder", str(found.folder)),
        ("digest", found.digest),
        ("base", found.config.base_model_name_or_path or "not said"),
        ("fingerprint", _describe_fingerprint(found.base)),
        ("rank", ", ".join(map(str, ranks)) or "no pairs"),
        ("alpha", f"{found.config.lora_alpha:g}" + (" (rank-stabilised)" if found.config.use_rslora else "")),
        ("layers", str(len(found.layers))),
        (
            "saved whole",
            ", ".join(f"{key} {'×'.join(map(str, shape))}" for key, shape in found.saved.items()) or "none",
        ),
        *((f"rows of {path}", _format_token_indices(indices)) for path, indices in found.tokens.items()),
        ("parameters", f"{found.parameters:,}"),
        ("size", format_size(found.bytes)),
        ("‖delta‖", f"{found.norm:.4g}"),
    ]
    facts += [("note", note) for note in found.notes]
    return facts + [
        (key, abbreviate(value))
        for key, value in found.record.items()
        if key in ("recipe", "seed", "metrics", "created")
    ]


def _describe_fingerprint(base: Mapping[str, Any] | None) -> str:
    if base is None:
        return "not said, so whether a base is the right one cannot be checked"
    weights = base.get("weights")
    count = len(weights) if isinstance(weights, Mapping) else 0
    return f"structure {str(base.get('structure'))[:12]}, {count} weights sampled"
