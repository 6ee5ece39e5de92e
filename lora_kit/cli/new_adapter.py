"""What the verbs share that write an adapter: `combine`, `convert`, `extract` and `resize`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lora_kit.cli.next_steps import list_adapter_commands, print_next
from lora_kit.cli.output import format_size, print_json, print_table

if TYPE_CHECKING:
    from lora_kit.adapter.adapter import Adapter


def check_adapter_output(out: Path, *, replace: bool, inputs: Iterable[str | Path]) -> None:
    """Check, before any work, that an adapter may be written to a folder.

    Args:
        inputs: files and folders that are read, and hub ids.

    Raises:
        StorageError: it may not: it exists, or is not apart from an input.
    """
    from lora_kit.adapter.folder import is_adapter_folder
    from lora_kit.io.atomic_write import check_output

    check_output(out, replace=replace, owned=is_adapter_folder, inputs=inputs)


def save_and_show(adapter: Adapter, out: Path, *, replace: bool, json: bool) -> None:
    """Save an adapter that was computed from others, and print how far it is from what was asked for."""
    from lora_kit.adapter.store import sum_file_sizes

    adapter.save(out, replace=replace)
    provenance = adapter.record["made"]
    ranks = sorted({weights.a.shape[0] for weights in adapter.pairs().values()})
    size = sum_file_sizes(out)
    if json:
        print_json({"out": str(out), "digest": adapter.digest, "ranks": ranks, "bytes": size, "made": provenance})
        return
    error = provenance["error"]
    exact = "the difference" if provenance["by"] == "extract" else "the exact result"
    rows = [
        ("adapter", str(out)),
        ("digest", adapter.digest),
        ("layers", str(len(adapter.pairs()))),
        ("rank", f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0]) if ranks else "no LoRA weights"),
        ("modules_to_save", ", ".join(adapter.saved()) or "none"),
        ("left out", ", ".join(provenance.get("left_out") or ()) or "nothing"),
        ("error", f"{error['share']:.3g} of {exact}, at most {error['worst']:.3g} in {error['worst_layer'] or 'any'}"),
        ("size", format_size(size)),
    ]
    print_table(("", ""), rows)
    print_next(list_adapter_commands(str(out), adapter.config, adapter.record))
