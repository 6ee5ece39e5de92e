"""`merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lora_kit.cli.app import ADAPTERS, AsJson, Replace, Store, app
from lora_kit.cli.screen import print_json, print_table, size

if TYPE_CHECKING:
    from lora_kit.merge import MergeReport


@app.command
def merge(
    *,
    adapter: str,
    out: Path,
    base: str | None = None,
    dtype: str | None = None,
    replace: Replace = False,
    allow: Annotated[
        list[str] | None, Parameter(negative="", help="other-base: merge into another base than the adapter's.")
    ] = None,
    store: Store = ADAPTERS,
    json: AsJson = False,
) -> None:
    """Fold an adapter into its base; write a model folder.

    What was written is read back and verified before the folder appears.

    Args:
        adapter: A folder, or a name in the store.
        out: The folder to write.
        base: Base model: hub id, local folder or kit-base; by default the one the adapter names.
        dtype: float32, bfloat16 or float16; by default that of the base.
    """
    from lora_kit.inspect import base_of, find_adapter
    from lora_kit.merge import merge as run

    folder = find_adapter(adapter, store=store)
    report = run(base or base_of([adapter], store=store), folder, out, dtype=dtype, replace=replace, allow=allow or ())
    if json:
        print_json(report.to_json())
        return
    print_table(("", ""), _merge_facts(report))


def _merge_facts(report: MergeReport) -> list[tuple[str, str]]:
    worst = report.worst
    kept = f"{report.retention:.1%} of the delta survived rounding to {report.dtype}"
    return [
        ("merged", str(report.out)),
        ("base", report.base),
        ("adapter", report.adapter[:12]),
        (
            "retention",
            f"{kept}; least, {worst.retained:.1%}, in {worst.path}" if worst else "no pairs; saved modules replaced",
        ),
        ("read back", "every tensor, bit for bit"),
        ("logits", f"at most {report.largest_difference:.3g} from base + adapter; bound {report.bound:.3g}"),
        ("effect", f"the adapter changes a logit by up to {report.effect:.3g}"),
        ("size", size(report.bytes)),
        ("time", f"{report.seconds:.1f} s"),
    ]
