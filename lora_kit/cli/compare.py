"""`compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_kit.cli.app import Allow, AsJson, Replace, Store, app
from lora_kit.cli.output import abbreviate, print_json, print_table, print_text
from lora_kit.names import DEFAULT_STORE

if TYPE_CHECKING:
    from lora_kit.algebra.compare import Comparison


@app.command
def compare(
    one: str,
    other: str,
    /,
    *,
    report: Path | None = None,
    replace: Replace = False,
    allow: Allow = None,
    store: Store = DEFAULT_STORE,
    json: AsJson = False,
) -> None:
    """Compare two adapters of one base, layer by layer.

    Example: lora-kit compare pirate mood

    Args:
        one: A folder, a name in the store, or a hub id.
        other: The same.
        report: File for a page with the figures and a picture, .html.
    """
    from lora_kit.adapter.store import find_adapter
    from lora_kit.algebra.compare import compare as run
    from lora_kit.evaluation.eval_page import check_page_file

    folders = [find_adapter(name, store=store) for name in (one, other)]
    if report is not None:
        check_page_file(report, replace=replace, inputs=folders)
    comparison = run(*folders, allow=allow or ())
    if report is not None:
        from lora_kit.algebra.compare_page import render_compare_page
        from lora_kit.io.atomic_write import write_file

        write_file(report, render_compare_page(comparison, (one, other)).encode())
    if json:
        print_json(comparison.to_json())
        return
    _print_comparison(comparison, one, other)
    if report is not None:
        print_text(f"\nreport: {report}")


def _print_comparison(comparison: Comparison, one: str, other: str) -> None:
    print_table(("", ""), _build_summary(comparison, one, other))
    print_table(
        ("layer", "cosine", "inputs", "outputs", *(f"‖{Path(name).name}‖" for name in (one, other))),
        [
            (
                path,
                f"{like.cosine:+.3f}",
                f"{like.inputs:.3f}",
                f"{like.outputs:.3f}",
                *(f"{n:.4g}" for n in like.norms),
            )
            for path, like in comparison.layers.items()
        ],
    )
    print_table(
        ("field", one, other), [(name, abbreviate(a), abbreviate(b)) for name, (a, b) in comparison.configs.items()]
    )


def _build_summary(comparison: Comparison, one: str, other: str) -> list[tuple[str, str]]:
    rows = [("cosine of all updates", f"{comparison.cosine:+.4f}"), ("layers of both", str(len(comparison.layers)))]
    rows += [
        (f"only in {name}", ", ".join(paths))
        for name, paths in zip((one, other), comparison.alone, strict=True)
        if paths
    ]
    return rows + [(f"{key} (modules_to_save)", how) for key, how in comparison.saved.items()]
