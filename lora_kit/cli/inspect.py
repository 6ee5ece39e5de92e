"""`inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lora_kit.cli.app import Allow, AsJson, Store, app
from lora_kit.cli.next_steps import build_loading_flags, list_adapter_commands, print_next
from lora_kit.cli.output import abbreviate, format_size, print_json, print_table
from lora_kit.errors import format_list
from lora_kit.names import DEFAULT_STORE

if TYPE_CHECKING:
    from lora_kit.adapter.inspect import Inspection


@app.command
def inspect(adapter: str, /, *, allow: Allow = None, store: Store = DEFAULT_STORE, json: AsJson = False) -> None:
    """Show what an adapter contains.

    Shows layers, norms and spectra of the deltas, size, base and record.

    Example: lora-kit inspect pirate

    Args:
        adapter: A folder, a name in the store, a hub id, or a file that another tool wrote.
    """
    from lora_kit.adapter.inspect import inspect as run

    inspection = run(adapter, store=store, allow=allow or ())
    if json:
        print_json(inspection.to_json())
        return
    print_table(("", ""), _build_adapter_facts(inspection))
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
            for layer in inspection.layers
        ],
        spare=("kind", "scaling", "99 % in"),
    )
    if not inspection.notes:  # what another tool wrote has to be converted, as the notes say
        flags = build_loading_flags(None, allow, store)
        print_next(list_adapter_commands(adapter, inspection.config, inspection.record, flags=flags))


def _format_token_indices(indices: Sequence[int]) -> str:
    return f"{len(indices):,} tokens: {format_list([str(index) for index in indices])}"


def _build_adapter_facts(inspection: Inspection) -> list[tuple[str, str]]:
    ranks = sorted({layer.rank for layer in inspection.layers})
    facts = [
        ("adapter", inspection.name),
        ("folder", str(inspection.folder)),
        ("digest", inspection.digest),
        ("base", inspection.config.base_model_name_or_path or "unknown"),
        ("fingerprint", _describe_fingerprint(inspection.base)),
        ("rank", ", ".join(map(str, ranks)) or "no LoRA weights"),
        ("alpha", f"{inspection.config.lora_alpha:g}" + (" (rank-stabilized)" if inspection.config.use_rslora else "")),
        ("layers", str(len(inspection.layers))),
        (
            "modules_to_save",
            ", ".join(f"{key} {'×'.join(map(str, shape))}" for key, shape in inspection.saved.items()) or "none",
        ),
        *(
            (f"token embeddings of {path}", _format_token_indices(indices))
            for path, indices in inspection.tokens.items()
        ),
        ("parameters", f"{inspection.parameters:,}"),
        ("size", format_size(inspection.bytes)),
        ("files", _describe_files(inspection)),
        ("‖delta‖", f"{inspection.norm:.4g}"),
    ]
    facts += [("note", note) for note in inspection.notes]
    return facts + [
        (key, abbreviate(value))
        for key, value in inspection.record.items()
        if key in ("recipe", "seed", "metrics", "created")
    ]


def _describe_files(inspection: Inspection) -> str:
    if inspection.changed_files is None:
        return "no lora_kit.json: they cannot be checked"
    changes = [f"{name} {change}" for name, change in inspection.changed_files.items()]
    return format_list(changes) if changes else "as they were saved"


def _describe_fingerprint(base: Mapping[str, object] | None) -> str:
    if base is None:
        return "none: no base can be checked against it"
    weights = base.get("weights")
    count = len(weights) if isinstance(weights, Mapping) else 0
    return f"structure {str(base.get('structure'))[:12]}, {count} weights sampled"
