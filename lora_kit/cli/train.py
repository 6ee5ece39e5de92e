"""`train`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lora_kit.cli.app import app
from lora_kit.cli.next_steps import build_command, build_flags, list_joint_commands, list_training_commands, print_next
from lora_kit.cli.output import format_size, print_if, print_json, print_table, print_text
from lora_kit.cli.process import show_progress_lines
from lora_kit.cli.recipe_flags import check_recipe_keys, parse_recipe_flags
from lora_kit.cli.recipe_help import RecipeHelp
from lora_kit.errors import ConfigError
from lora_kit.io.text import escape_for_terminal

if TYPE_CHECKING:
    from lora_kit.training.recipe.recipe import Recipe
    from lora_kit.training.results import TrainPlan, TrainReport


@app.command(usage="Usage: lora-kit train RECIPE [RECIPE ...] [--KEY VALUE ...]", help_formatter=RecipeHelp())
def train(
    recipe: Path,
    /,
    *flags: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
) -> None:
    """Train an adapter from a recipe, or several over one base; flags win over recipes.

    The recipe is YAML or TOML. Any key of it is a flag: --base, --out, --lora.r 8, --train.learning_rate 1e-3,
    --data.train rows.jsonl. --replace, or --force, replaces an existing adapter. The same command continues a
    training that was stopped, from its last checkpoint. --dry-run prints what would be done and how long it would
    take, and neither trains nor writes anything. --json prints either as JSON. Started by torchrun with `-m lora_kit
    train`, several processes share the rows of each batch.

    Several recipes are trained in one pass over their base, each to the result that it has alone; --together 4 is how
    many at once, at most.

    Example: lora-kit train recipe.yaml --lora.r 8

    Args:
        recipe: The file of the recipe; further ones may follow.
    """
    if "RANK" in os.environ:  # torch would report a lost process with a traceback of its own; read when it is imported
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    recipes, rest = split_recipes(recipe, flags)
    values = parse_recipe_flags(rest)
    together = values.pop("together", None)
    replace, force, dry, as_json = (_take_switch(values, name) for name in ("replace", "force", "dry_run", "json"))
    if (len(recipes) > 1 and dry) or (len(recipes) == 1 and together is not None):
        raise ConfigError("--dry-run is for one recipe, and --together for several")
    if "RANK" not in os.environ:  # of several processes one says what is wrong, once they have met
        check_recipe_keys(values, recipes)
    from lora_kit.training.loop.world import join_world

    with join_world() as world, print_if(world.is_first):
        if dry:
            _print_plan(recipe, values, replace=replace or force, as_json=as_json)
        elif len(recipes) > 1:
            _train_many(recipes, values, replace=replace or force, together=together, as_json=as_json)
        else:
            _train(recipe, values, replace=replace or force, as_json=as_json)


def _print_plan(recipe: Path, overrides: Mapping[str, str], *, replace: bool, as_json: bool) -> None:
    from lora_kit.training.plan.plan import plan

    train_plan = plan(recipe, overrides=overrides, replace=replace)
    if as_json:
        print_json(train_plan.to_json())
        return
    print_table(("", ""), _build_plan_facts(train_plan))
    flags = [word for key, value in overrides.items() for word in build_flags(key, value)]
    print_next([build_command("train", recipe, *flags, *["--replace"] * replace)])


def _train(recipe: Path, overrides: Mapping[str, str], *, replace: bool, as_json: bool) -> None:
    from lora_kit.training.job.output import REPORT_FILE
    from lora_kit.training.recipe.load import load_recipe
    from lora_kit.training.train import train

    resolved = load_recipe(recipe, overrides=overrides)
    if not as_json:
        print(_format_headline(resolved), flush=True)
    with show_progress_lines():
        report = train(resolved, replace=replace)
    if as_json:
        print_json(report.to_json())
        return
    print_table(("", ""), _build_train_facts(report))
    print_next(list_training_commands(report.recipe, of_pairs=report.text_pairs))
    print_text(f"\nreport: {report.out / REPORT_FILE}")


def split_recipes(first: Path, flags: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return the recipes, and the flags that follow them."""
    more = list(itertools.takewhile(lambda token: not token.startswith("--"), flags))
    return [first, *map(Path, more)], list(flags[len(more) :])


def _train_many(
    recipes: Sequence[Path], values: dict[str, str], *, replace: bool, together: str | None, as_json: bool
) -> None:
    """Train several recipes, and print a line for each that was saved, or their reports as one JSON list.

    Raises:
        PartialTrainingError: names those that failed.
    """
    from lora_kit.training.results import PartialTrainingError
    from lora_kit.training.together.train_many import MOST_TOGETHER, train_many

    if together is not None and not together.isdecimal():
        raise ConfigError(f"--together takes a number; {together!r} was given")
    most = MOST_TOGETHER if together is None else int(together)
    with show_progress_lines():
        try:
            reports: Sequence[TrainReport] = train_many(recipes, overrides=values, replace=replace, together=most)
        except PartialTrainingError as error:
            _print_reports(error.reports, as_json=as_json)
            raise
    _print_reports(reports, as_json=as_json)


def _print_reports(reports: Sequence[TrainReport], *, as_json: bool) -> None:
    if as_json:
        print_json([report.to_json() for report in reports])
        return
    for report in reports:
        print_text(_format_report_line(report))
    print_next(list_joint_commands(reports))


def _format_report_line(report: TrainReport) -> str:
    after = report.after.metrics() if report.after else {}
    metrics = "".join(f", validation {key} {value:.4f}" for key, value in after.items())
    loss = f"training loss {report.train_loss:.4f}{metrics}"
    return f"{report.out}: {report.steps:,} steps, {loss}, {report.digest or 'every weight'}"


def _take_switch(values: dict[str, str], name: str) -> bool:
    """Remove a flag without a value from the others and return whether it was there."""
    value = values.pop(name, "false")
    if value not in ("true", "false"):
        raise ConfigError(f"--{name.replace('_', '-')} takes no value; {value!r} was given")
    return value == "true"


def _format_headline(recipe: Recipe) -> str:
    from lora_kit.data.mixture import describe_source

    lora = f" r={recipe.lora.r} alpha={recipe.lora.lora_alpha:g}" if recipe.method == "lora" else ""
    length = f"{recipe.train.get('num_train_epochs', 3):g} x the data"
    if recipe.train.get("max_steps", -1) > 0:
        length = f"{recipe.train['max_steps']} steps"
    lora += f" {recipe.peft['peft_type']}" if recipe.method == "peft" else ""
    what = f"{recipe.task}, {recipe.method}{lora} on {recipe.base}"
    return escape_for_terminal(
        f"{what}: {describe_source(recipe.data.train)}, {length}, learning rate {_format_rates(recipe)} -> {recipe.out}"
    )


def _format_rates(recipe: Recipe) -> str:
    head, ratio = (recipe.train.get(name) for name in ("head_learning_rate", "loraplus_lr_ratio"))
    own = [f"head {head:g}"] if head is not None else []
    own += [f"B times {ratio:g}"] if ratio is not None else []
    return f"{recipe.train['learning_rate']:g}" + (f" ({', '.join(own)})" if own else "")


def _build_train_facts(report: TrainReport) -> list[tuple[str, str]]:
    stopped = f"; continued from step {report.resumed:,}" if report.resumed else ""
    facts = [
        ("written", str(report.out)),
        ("trained", f"{report.trainable:,} of {report.parameters:,} parameters, {report.steps:,} steps{stopped}"),
        ("time", f"{report.seconds:.1f} s, {report.tokens_per_second:,.0f} tokens/s"),
        ("memory", f"at most {format_size(report.peak_bytes)}"),
        ("training loss", f"{report.train_loss:.4f}"),
    ]
    before, after = (evaluation.metrics() if evaluation else {} for evaluation in (report.before, report.after))
    facts += [(f"validation {key}", f"{before[key]:.4f} before, {value:.4f} after") for key, value in after.items()]
    if report.is_stopped_early:
        facts.append(("stopped early", f"at step {report.steps:,} of {report.max_steps:,}"))
    if report.kept != report.steps:
        facts.append(("kept", f"step {report.kept:,}, the best"))
    return facts + ([("digest", report.digest)] if report.digest else [])


def _describe_learned(plan: TrainPlan) -> tuple[str, str]:
    """Return the fact that says of what the loss is computed."""
    from lora_kit.training.recipe.objectives import count_answer_tokens, count_answers

    recipe, data = plan.recipe, plan.data
    tokens = count_answer_tokens(recipe.objective, recipe.train, data.longest)
    if tokens:
        answers = count_answers(recipe.objective, recipe.train)
        return "answers", f"{answers} to each prompt, of up to {tokens:,} tokens: a sample of a batch is one of them"
    return "labels", f"{data.labels:,} ({data.labels / data.tokens:.1%} of the tokens)"


def _build_plan_facts(plan: TrainPlan) -> list[tuple[str, str]]:
    data, steps, memory, measured = plan.data, plan.steps, plan.memory, plan.measured
    cut = f"; {data.cut:,} rows cut to fit {data.longest:,} tokens" if data.cut else ""
    if data.divided:
        cut += f"; {data.divided:,} conversations have a sample for each answer that is rendered differently later on"
    fewer = f" (memory ran out with {steps.micro_batch})" if measured.micro_batch != steps.micro_batch else ""
    speed, rows = measured.tokens / measured.seconds, measured.micro_batch * steps.processes
    accumulation, shared = -(-steps.batch // rows), f" in each of {steps.processes} processes" * (steps.processes > 1)
    peak = f"{format_size(measured.peak_bytes)} at most in it and in one of the longest rows, measured"
    later = (
        f"of the whole process, Python and libraries included; of later steps at most {format_size(plan.most_bytes)}"
    )
    parts = [("weights", memory.weights), ("trained", memory.trained), ("gradients", memory.gradients),
             ("optimizer", memory.optimizer), ("activations", memory.activations),
             ("an evaluation, without gradients and activations", memory.evaluation)]  # fmt: skip
    facts = [
        ("would write", f"{plan.out}" + (f", continuing from step {plan.goes_on_from:,}" if plan.goes_on_from else "")),
        ("trainable", f"{plan.trainable:,} of {plan.parameters:,} parameters ({plan.trainable / plan.parameters:.2%})"),
    ]
    facts += [("", f"{kind.name}: {kind.modules} modules, {kind.parameters:,}") for kind in plan.kinds]
    return [
        *facts,
        *([("head", plan.head)] if plan.head else []),
        ("data", f"{data.rows:,} rows, {data.samples:,} samples, {data.tokens:,} tokens{cut}"),
        *([("frozen layers", plan.frozen)] if plan.frozen else []),
        _describe_learned(plan),
        (
            "steps",
            f"{steps.steps:,}, {steps.warmup:,} of them warm-up; {steps.per_epoch:,} for each pass over the data",
        ),
        ("learning rate", _format_rates(plan.recipe)),
        ("batch", f"{steps.batch} samples: {measured.micro_batch} at once{shared}{fewer}, accumulation {accumulation}"),
        ("memory", f"{format_size(memory.total)} counted, in the largest batch that these rows may form"),
        *(("", f"{name}: {format_size(amount)}") for name, amount in parts if amount),
        ("one step", f"{measured.seconds:.3f} s, {measured.tokens:,} tokens, {speed:,.0f} tokens/s, measured"),
        ("", peak),
        *([("", later)] if measured.peak_of == "process" else []),
        ("all steps", f"about {timedelta(seconds=round(plan.seconds))}, without evaluations"),
    ]
