"""`export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lora_kit.cli.app import AsJson, MergeAllow, Replace, Store, app
from lora_kit.cli.next_steps import list_model_commands, print_next
from lora_kit.cli.output import format_size, print_json, print_table
from lora_kit.names import DEFAULT_STORE

TargetOption = Annotated[
    str,
    Parameter(
        help="peft, vllm, sglang, tgi, gguf, ollama or mlx; for a whole model merged, gguf-model or ollama-model."
    ),
]
BaseOption = Annotated[
    str | None,
    Parameter(
        help="Hub id, local folder or kit-base: the base, whose config gguf and ollama need; by default the one that "
        "the adapter names, where it is here."
    ),
]
MaxRankOption = Annotated[int | None, Parameter(help="The largest rank that the reader is started with.")]


@app.command
def export(
    adapter: str,
    /,
    *,
    target: TargetOption,
    out: Path,
    base: BaseOption = None,
    max_lora_rank: MaxRankOption = None,
    replace: Replace = False,
    allow: MergeAllow = None,
    store: Store = DEFAULT_STORE,
    json: AsJson = False,
) -> None:
    """Export an adapter for another program, with the same outputs there as here.

    The README in the folder shows the command that loads it.

    Example: lora-kit export pirate --target vllm --out exported/pirate

    Args:
        adapter: A folder, a name in the store, or a hub id.
        out: The folder to write.
    """
    from lora_kit.adapter.store import find_adapter
    from lora_kit.exporters.export import CARD, MERGED
    from lora_kit.exporters.export import export as run

    folder = find_adapter(adapter, store=store)
    exported = run(folder, target, out, base=base, max_lora_rank=max_lora_rank, replace=replace, allow=allow or ())
    if json:
        print_json(exported.to_json())
        return
    rows = [("written", str(exported.out)), ("for", exported.target), ("size", format_size(exported.bytes))]
    rows += [("changed", change) for change in exported.changed]
    if exported.target != MERGED:
        print_table(("", ""), [*rows, ("how it is loaded", str(exported.out / CARD))])
        print_next(exported.commands)
        return
    print_table(("", ""), rows)
    print_next(list_model_commands(exported.out))
