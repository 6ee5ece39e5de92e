"""A sweep: many trainings that differ in some keys of one recipe, and the best of them kept."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import ConfigError, RecipeError
from lora_kit.evaluation.metrics import BASIC_METRICS, validate_metrics
from lora_kit.io.atomic_write import check_output
from lora_kit.io.text import escape_text
from lora_kit.models.loading import Base
from lora_kit.models.silence import silence_libraries
from lora_kit.sweeps.space import Space, check_values, size_of, space_of
from lora_kit.sweeps.sweep_plan import Plan, over_of, shares_base, sums_of_files
from lora_kit.training.job.job import Job
from lora_kit.training.job.output import check_output_writable
from lora_kit.training.recipe.coerce import as_json, check_one_of
from lora_kit.training.recipe.load import load_recipe, read_recipe_fields
from lora_kit.training.recipe.recipe import Recipe
from lora_kit.training.recipe.training_arguments import best_metric_of

if TYPE_CHECKING:
    from lora_kit.sweeps.sweep_report import SweepReport

logger = logging.getLogger(__name__)

METHODS: Final = ("grid", "random", "tpe")
PRUNERS: Final = ("median",)
KEEP: Final = ("best", "all")
_TRIALS: Final = 20


def sweep(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    over: Mapping[str, Any] | Iterable[str],
    *,
    base: Base | None = None,
    overrides: Mapping[str, Any] | None = None,
    method: str | None = None,
    metric: str | None = None,
    trials: int | None = None,
    seed: int | None = None,
    prune: str | None = None,
    keep: str = "best",
    workers: int = 1,
    replace: bool = False,
) -> SweepReport:
    """Train a recipe with many values of some of its keys, and write the best result to the recipe's `out`.

    What was done is kept in a folder beside `out`: a sweep that was stopped, in the middle of a training too, goes on
    when it is started again. One worker then ends with the trials of a sweep that was never stopped. The same sweep
    started by several processes is shared between them.

    Args:
        recipe, base, overrides: as `lora_kit.training.train.train` takes them; the base is loaded once.
        over: by recipe key a list of values, or a text: `4,8,16`, or a range `1e-4..1e-2:log`.
        method: `grid` for every combination, `random`, or `tpe` (Bayesian, optuna's). None: `grid` where every key has
            a list, else `tpe`.
        metric: of the validation rows, one of `lora_kit.evaluation.metrics.METRICS`; which way is better is known.
            None: the recipe's `metric_for_best_model`, or the loss.
        trials: how many; None for all of a grid, else 20.
        seed: decides what is tried; None for the recipe's.
        prune: `median` stops a trial that is worse at an evaluation than half of the others were by then.
        keep: `all` leaves the results of all trials in the sweep's folder.
        workers: processes that share the trials.
        replace: what is at `out` may be replaced, and so may another sweep.

    Raises:
        RecipeError, DataError, BaseModelError: what was given is wrong, or differs from what was begun; no trial ran.
        ConfigError: an argument that is none, or optuna is not installed.
        StorageError: the machine; what was done is kept.
        VerificationError: no trial came through.
    """
    if workers < 1:
        raise ConfigError(f"workers counts from 1; {workers} was given")
    if workers > 1 and base is not None:
        raise ConfigError("a base that is loaded already cannot be shared by several workers", hint="leave base out")
    _check_optuna()
    fields, _ = read_recipe_fields(recipe, overrides=overrides)
    space, wanted = space_of(over), load_recipe(fields)
    metric = metric or best_metric_of(wanted.train)
    fields = _measuring(metric, wanted, fields)
    wanted = load_recipe(fields)
    plan, base = _planned(wanted, fields, space, base, method=method, metric=metric, trials=trials, seed=seed,
                          prune=prune, keep=keep, replace=replace)  # fmt: skip
    plan.take_folder(replace=replace)
    # These need optuna, and what they import takes its time.
    from lora_kit.sweeps.processes import shared
    from lora_kit.sweeps.study import Study
    from lora_kit.sweeps.sweep_report import finished
    from lora_kit.sweeps.worker import Worker

    try:
        if workers == 1:
            Worker(plan, base=base).run()
        else:
            del base
            shared(plan, workers)
    except BaseException:
        logger.warning("stopped; the same command goes on with the sweep in %s", escape_text(plan.folder))
        raise
    return finished(Study(plan), replace=replace)


def _check_optuna() -> None:
    try:
        import optuna  # noqa: F401 - only whether it is there
    except ImportError:
        raise ConfigError(
            "a sweep needs optuna, which is not installed", hint="pip install 'lora-kit[sweep]'"
        ) from None


def _measuring(metric: str, wanted: Recipe, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a recipe whose evaluations give a metric.

    Raises:
        RecipeError: the recipe tells its best weights by another one.
    """
    validate_metrics([metric], wanted.task)
    own = wanted.train.get("metric_for_best_model")
    if metric in BASIC_METRICS[wanted.task] or (own and best_metric_of(wanted.train) == metric):
        return fields
    if own:
        raise RecipeError(
            f"the recipe keeps the best weights by {own}, and trials are compared by {metric}",
            hint="choose one of the two, or leave train.metric_for_best_model out",
        )
    asked: dict[str, Any] = {"train.metric_for_best_model": metric}
    if str(wanted.train.get("eval_strategy", "no")) == "no":
        asked["train.load_best_model_at_end"] = False  # there is one evaluation, at the end
    return read_recipe_fields(fields, overrides=asked)[0]


def _planned(
    wanted: Recipe, fields: dict[str, Any], space: Space, base: Base | None, *, trials: int | None, **asked: Any
) -> tuple[Plan, Base | None]:
    """The plan, and the base that was loaded to check it where trials can share it."""
    from lora_kit.sweeps.sweep_report import mark_of, owned

    replace = asked.pop("replace")
    asked["method"] = asked["method"] or ("tpe" if size_of(space) is None else "grid")
    asked["seed"] = wanted.seed if asked["seed"] is None else asked["seed"]
    _check(wanted, space, base, **asked)
    check_values(space, fields)
    check_output_writable(wanted)
    with silence_libraries():
        job = Job.open(wanted, base)
        identity = {**job.identity, "over": over_of(space), "files": sums_of_files(space)}
    identity["sweep"] = {name: asked[name] for name in ("method", "metric", "seed", "prune")}
    plan = Plan(
        out=Path(wanted.out),
        fields=_as_plain(fields, wanted),
        space=space,
        trials=_count(space, trials),
        identity=identity,
        **asked,
    )
    plan.check_folder(replace=replace)
    if mark_of(plan.out).get("sweep") != plan.digest:
        check_output(plan.out, replace=replace, owned=owned)
    return plan, base or (job.base if shares_base(wanted) else None)


def _as_plain(fields: Mapping[str, Any], wanted: Recipe) -> dict[str, Any]:
    """What stands in a recipe as JSON values; a config in it by its fields."""
    found = {key: as_json(value) for key, value in fields.items() if key != "lora"}
    lora = fields.get("lora")
    if lora is None:
        return found
    return {**found, "lora": wanted.to_dict()["lora"] if isinstance(lora, LoraConfig) else as_json(lora)}


def _count(space: Space, trials: int | None) -> int:
    if trials is not None and trials < 1:
        raise ConfigError(f"trials counts from 1; {trials} was given")
    size = size_of(space)
    return min(trials or size or _TRIALS, size or sys.maxsize)


def _check(
    wanted: Recipe,
    space: Space,
    base: Base | None,
    *,
    method: str,
    metric: str,
    prune: str | None,
    keep: str,
    seed: int,
) -> None:
    check_one_of("method", method, METHODS)
    check_one_of("keep", keep, KEEP)
    if seed < 0:
        raise ConfigError(f"seed counts from 0; {seed} was given")
    if method == "grid" and size_of(space) is None:
        raise RecipeError("a grid is of lists of values, and there is a range", hint="method random or tpe")
    if wanted.data.validation is None:
        raise RecipeError("a sweep compares trials on data.validation, and the recipe names none")
    if prune is not None:
        check_one_of("prune", prune, PRUNERS)
        if str(wanted.train.get("eval_strategy", "no")) == "no" and "train.eval_strategy" not in space:
            raise RecipeError(
                "prune compares evaluations made in training, and train.eval_strategy is no",
                hint="train.eval_strategy: steps, and train.eval_steps",
            )
    swept = [key for key in ("base", "dtype", "quantize") if key in space]
    if base is not None and swept:
        raise RecipeError(f"{swept[0]} is swept, and a base that is loaded already was given", hint="leave it out")
