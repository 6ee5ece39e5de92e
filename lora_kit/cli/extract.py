"""`extract`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_kit.cli.app import AsJson, Replace, app, check_adapter_output
from lora_kit.cli.merge import show_bytes_bar

if TYPE_CHECKING:
    pass
from lora_kit.cli.combine import _save_and_show


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
    from lora_kit.algebra.extract import extract as run

    check_adapter_output(out, replace=replace)
    with show_bytes_bar("comparing") as progress:
        made = run(base, tuned, rank=rank, energy=energy, others=others, progress=progress)
    _save_and_show(made, out, replace=replace, json=json)
