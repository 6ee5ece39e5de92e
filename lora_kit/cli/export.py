"""`export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lora_kit.cli.app import AsJson, Replace, Store, app
from lora_kit.cli.output import format_size, print_json, print_table
from lora_kit.names import DEFAULT_STORE

if TYPE_CHECKING:
    from lora_kit.exporters.export import Verdict

TargetOption = Annotated[str, Parameter(help="merged, peft, vllm, sglang, tgi, gguf, ollama or mlx.")]
BaseOption = Annotated[
    str | None,
    Parameter(help="Hub id, local folder or kit-base: the adapter's base, whose config gguf and ollama need."),
]
MaxRankOption = Annotated[int | None, Parameter(help="The largest rank the reader is started for.")]


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
    store: Store = DEFAULT_STORE,
    json: AsJson = False,
) -> None:
    """Write an adapter for another program, doing the same there as here.

    The folder's README has the command that loads it.

    Args:
        adapter: A folder, or a name in the store.
        out: The folder to write.
    """
    from lora_kit.adapter.store import find_adapter
    from lora_kit.exporters.export import export as run

    folder = find_adapter(adapter, store=store)
    made = run(folder, target, out, base=base, max_lora_rank=max_lora_rank, replace=replace)
    if json:
        print_json(made.to_json())
        return
    rows = [("written", str(made.out)), ("for", made.target), ("size", format_size(made.bytes))]
    print_table(("", ""), rows + [("changed", change) for change in made.changed])


def _format_verdict(found: Verdict) -> list[tuple[str, str]]:
    rows = [("reader", found.reader), ("fits", "no" if found.refused else "yes")]
    rows += [("cannot take", reason) for reason in found.refused]
    rows += [("export changes", change) for change in found.changed]
    return rows + [("needs", need) for need in found.needed]
