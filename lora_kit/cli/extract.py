"""`extract`."""

from __future__ import annotations

from pathlib import Path

from lora_kit.cli.app import AsJson, Replace, app
from lora_kit.cli.new_adapter import check_adapter_output, save_and_show
from lora_kit.cli.output import show_bytes_bar


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
    """Extract an adapter from a full fine-tune: a low-rank approximation of what changed.

    Example: lora-kit extract --base kit-base --tuned full --rank 16 --out adapters/new

    Args:
        base: Hub id, local folder or kit-base.
        tuned: The fine-tune of it: hub id or local folder.
        out: The adapter folder to write.
        rank: Rank in every layer, at most.
        energy: Share of each difference's squared norm to keep, above 0 to 1.
        others: What to do with norms, biases and embeddings that differ: list names them and leaves them out, save
            puts them into modules_to_save.
    """
    from lora_kit.algebra.extract import extract as run

    check_adapter_output(out, replace=replace, inputs=[base, tuned])
    with show_bytes_bar("comparing") as progress:
        adapter = run(base, tuned, rank=rank, energy=energy, others=others, progress=progress)
    save_and_show(adapter, out, replace=replace, json=json)
