"""`convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lora_kit.cli.app import AsJson, Replace, app
from lora_kit.cli.new_adapter import check_adapter_output
from lora_kit.cli.next_steps import list_adapter_commands, print_next
from lora_kit.cli.output import print_json, print_table
from lora_kit.errors import ConfigError

if TYPE_CHECKING:
    from lora_kit.adapter.adapter import Adapter

Renames = Annotated[
    list[str] | None,
    Parameter(
        name="--rename", negative="", help="OLD=NEW: the beginning of module paths in the files, and in the base."
    ),
]


@app.command
def convert(
    source: Path,
    /,
    *,
    out: Path,
    alpha: float | None = None,
    enable_lora: list[bool] | None = None,
    rename: Renames = None,
    base: str | None = None,
    replace: Replace = False,
    json: AsJson = False,
) -> None:
    """Convert what another tool wrote into an adapter folder.

    Reads PEFT of any age, state dicts of live models, loralib, litgpt and mlx-lm; the updates stay the same.

    Example: lora-kit convert their-adapter --out adapters/mine

    Args:
        source: A folder, a weight file, a name in the store, or a hub id.
        out: The adapter folder to write.
        alpha: Numerator of the scaling, where the files do not contain it (loralib, PEFT's weights alone).
        enable_lora: Which of the equal parts of a fused projection have LoRA weights, once for each part.
        base: Name of the base. Where it is a folder, or in the local cache, the result is checked against it.
    """
    from lora_kit.adapter.conversion.convert import convert as run
    from lora_kit.adapter.store import find_adapter

    given = source if source.exists() else find_adapter(str(source))
    check_adapter_output(out, replace=replace, inputs=[given])
    parts = [item.partition("=") for item in rename or ()]
    if any(not old or not sign for old, sign, _ in parts):
        raise ConfigError(f"--rename {rename} was given", hint="OLD=NEW, as in language_model.model=model")
    renames = {old: new for old, _, new in parts}
    adapter = run(
        given,
        lora_alpha=alpha,
        enable_lora=enable_lora,
        renames=renames,
        base=base,
    )
    if base is not None:
        _check_base(adapter, base, name=out.name)
    adapter.save(out, replace=replace)
    facts = adapter.record["converted"]
    if json:
        print_json({"out": str(out), "digest": adapter.digest, **facts})
        return
    rows = [("adapter", str(out)), ("digest", adapter.digest), ("written by", facts["layout"])]
    rows += [
        ("LoRA layers", str(len(adapter.all_pairs()))),
        ("modules_to_save", ", ".join(adapter.config.modules_to_save) or "none"),
    ]
    print_table(("", ""), rows + [("", note) for note in facts["notes"]])
    print_next(list_adapter_commands(str(out), adapter.config, adapter.record))


def _check_base(adapter: Adapter, base: str, *, name: str) -> None:
    """Raise AdapterError where the base is at hand and the adapter does not load into it by its names."""
    from lora_kit.exporters.plain_lora import ExportCase
    from lora_kit.models.locate import reason_not_here

    if reason_not_here(base) is None:
        ExportCase(name, adapter, base, known=True).check_base(())
