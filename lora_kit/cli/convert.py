"""`convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lora_kit.cli.app import AsJson, Replace, app, check_adapter_output
from lora_kit.cli.output import print_json, print_table
from lora_kit.errors import ConfigError

Renames = Annotated[
    list[str] | None,
    Parameter(name="--rename", negative="", help="OLD=NEW: what module paths begin with, and what the base has there."),
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
    """Make an adapter of ours from what another tool wrote.

    PEFT of any age, state dicts of wrapped models, loralib, mlx-lm; the updates stay what they are.

    Args:
        source: A folder or a weight file.
        out: The adapter folder to write.
        alpha: Numerator of the scaling, where the files do not say it (loralib).
        enable_lora: Which of the equal parts of a fused projection have a pair, once for each part.
        base: What the base is called.
    """
    from lora_kit.adapter.conversion.convert import convert as run

    check_adapter_output(out, replace=replace)
    pairs = [item.partition("=") for item in rename or ()]
    if any(not old or not sign for old, sign, _ in pairs):
        raise ConfigError(f"--rename {rename} was given", hint="OLD=NEW, as in language_model.model=model")
    renames = {old: new for old, _, new in pairs}
    made = run(source, lora_alpha=alpha, enable_lora=enable_lora, renames=renames, base=base)
    made.save(out, replace=replace)
    facts = made.record["converted"]
    if json:
        print_json({"out": str(out), "digest": made.digest, **facts})
        return
    rows = [("adapter", str(out)), ("digest", made.digest), ("written by", facts["layout"])]
    rows += [("pairs", str(len(made.all_pairs()))), ("saved whole", ", ".join(made.config.modules_to_save) or "none")]
    print_table(("", ""), rows + [("", note) for note in facts["notes"]])
