"""`train`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lora_kit.cli.app import app
from lora_kit.cli.screen import harmless, print_table, size
from lora_kit.cli.shell import told
from lora_kit.errors import ConfigError

if TYPE_CHECKING:
    from lora_kit.train import Recipe, TrainReport


@app.command(usage="Usage: lora-kit train RECIPE [--KEY VALUE ...]")
def train(
    recipe: Path,
    /,
    *flags: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
) -> None:
    """Train an adapter from a recipe; flags win over it.

    The recipe is YAML or TOML. Any key of it is a flag: --base, --out, --lora.r 8, --train.learning_rate 1e-3,
    --data.train rows.jsonl; --replace replaces an adapter that is there. A training that was stopped
    goes on from its last checkpoint when the same command is given again.

    Args:
        recipe: The recipe's file.
    """
    from lora_kit.train import load_recipe
    from lora_kit.train import train as run

    values = _dotted(flags)
    replace = values.pop("replace", "false")
    if replace not in ("true", "false"):
        raise ConfigError(f"--replace takes no value; {replace!r} was given")
    wanted = load_recipe(recipe, overrides=values)
    print(_plan(wanted), flush=True)
    with told():
        report = run(wanted, replace=replace == "true")
    print_table(("", ""), _train_facts(report))


def _dotted(flags: Sequence[str]) -> dict[str, str]:
    """`--lora.r 8 --out=x --replace` as `{"lora.r": "8", "out": "x", "replace": "true"}`.

    Dashes in keys count as underscores.

    Raises:
        ConfigError: a value without a key.
    """
    found: dict[str, str] = {}
    waiting = list(flags)
    while waiting:
        token = waiting.pop(0)
        if not token.startswith("--") or token == "--":
            raise ConfigError(
                f"{token!r} was given where a flag such as --lora.r was expected", hint="lora-kit train --help"
            )
        key, equals, value = token[2:].partition("=")
        if not equals:
            value = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "true"
        found[key.replace("-", "_")] = value
    return found


def _plan(recipe: Recipe) -> str:
    lora = f" r={recipe.lora.r} alpha={recipe.lora.lora_alpha:g}" if recipe.method == "lora" else ""
    length = f"{recipe.train.get('num_train_epochs', 3):g} x the data"
    if recipe.train.get("max_steps", -1) > 0:
        length = f"{recipe.train['max_steps']} steps"
    rate = f"{recipe.train['learning_rate']:g}"
    what = f"{recipe.task}, {recipe.method}{lora} on {recipe.base}"
    return harmless(f"{what}: {recipe.data.train}, {length}, learning rate {rate} -> {recipe.out}")


def _train_facts(report: TrainReport) -> list[tuple[str, str]]:
    stopped = f"; went on from step {report.resumed:,}" if report.resumed else ""
    facts = [
        ("written", str(report.out)),
        ("trained", f"{report.trainable:,} of {report.parameters:,} parameters, {report.steps:,} steps{stopped}"),
        ("time", f"{report.seconds:.1f} s, {report.tokens_per_second:,.0f} tokens/s"),
        ("memory", f"{size(report.peak_bytes)} at the most"),
        ("training loss", f"{report.train_loss:.4f}"),
    ]
    before, after = (evaluation.metrics() if evaluation else {} for evaluation in (report.before, report.after))
    facts += [(f"validation {key}", f"{before[key]:.4f} before, {value:.4f} after") for key, value in after.items()]
    if report.kept != report.steps:
        facts.append(("kept", f"step {report.kept:,}, the best"))
    return facts + ([("digest", report.digest)] if report.digest else [])
