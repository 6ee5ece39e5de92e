"""A sweep: many trainings that differ in some keys of one recipe, and the best of them kept."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypedDict

from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import ConfigError, RecipeError
from lora_kit.evaluation.metrics import basic_metrics
from lora_kit.io.text import escape_text
from lora_kit.models.loading import Base
from lora_kit.models.silence import silence_libraries
from lora_kit.sweeps.space import check_trials_together, check_values, format_space, list_combinations, parse_space
from lora_kit.training.job.job import Job
from lora_kit.training.job.output import check_output_writable, refuse_inputs
from lora_kit.training.job.recipe_rows import read_recipe_rows
from lora_kit.training.recipe.coerce import as_json, check_one_of
from lora_kit.training.recipe.load import load_recipe, read_recipe_fields
from lora_kit.training.recipe.objectives import SFT, TRL_OBJECTIVES
from lora_kit.training.recipe.recipe import Recipe
from lora_kit.training.recipe.training_arguments import best_metric_of, check_best_metric

if TYPE_CHECKING:
    from lora_kit.sweeps.space import Space
    from lora_kit.sweeps.sweep_plan import SweepPlan
    from lora_kit.sweeps.sweep_report import SweepReport

logger = logging.getLogger(__name__)

METHODS: Final = ("grid", "random", "tpe")
PRUNERS: Final = ("median",)
KEEP: Final = ("best", "all")
_DEFAULT_TRIALS: Final = 20


def sweep(
    recipe: str | Path | Mapping[str, object] | Recipe,
    over: Mapping[str, object] | Iterable[str],
    *,
    base: Base | None = None,
    overrides: Mapping[str, object] | None = None,
    method: str | None = None,
    metric: str | None = None,
    trials: int | None = None,
    seed: int | None = None,
    prune: str | None = None,
    keep: str = "best",
    workers: int = 1,
    together: int = 1,
    replace: bool = False,
) -> SweepReport:
    """Train a recipe with many values of some of its keys, and write the best result to the recipe's `out`.

    The trials are recorded in a folder beside `out`: a sweep that was stopped, in the middle of a training too,
    continues when it is started again. One worker then ends with the trials of a sweep that was never stopped. Several
    processes that start the same sweep share its trials.

    Args:
        recipe, base, overrides: as `lora_kit.training.train.train` takes them; the base is loaded once.
        over: for each recipe key a list of values, or a text: `4,8,16`, or a range `1e-4..1e-2:log`.
        method: `grid` for every combination, `random`, or `tpe` (Bayesian, Optuna's). None: `grid` where every key has
            a list, else `tpe`.
        metric: of the validation rows, one of `lora_kit.evaluation.metrics.METRICS`, or of the recipe's objective;
            which way is better is known.
            None: the recipe's `metric_for_best_model`, or the loss.
        trials: how many; None for all of a grid, else 20.
        seed: decides what is tried; None for the recipe's.
        prune: `median` stops a trial that is worse at an evaluation than half of the others were at that step.
        keep: `all` keeps the results of all trials in the sweep's folder.
        workers: processes that share the trials.
        together: trials that a process trains at once, each as if alone (`train_many`); for keys of `lora` and `train`.
        replace: what is at `out` may be replaced, and so may another sweep.

    Raises:
        RecipeError, DataError, BaseModelError: an argument is invalid, or another sweep began there; no trial ran.
        ConfigError: an argument is unknown, or optuna is not installed.
        StorageError: the machine failed; what was done is kept.
        VerificationError: no trial is complete.
    """
    _check_arguments(
        base=base, method=method, trials=trials, seed=seed, prune=prune, keep=keep, workers=workers, together=together
    )
    space = parse_space(over)
    fields, loaded, metric = _read_recipe(recipe, overrides, metric)
    refuse_inputs(loaded)
    settings: SweepSettings = {
        "method": method or ("tpe" if list_combinations(space) is None else "grid"),
        "metric": metric,
        "seed": loaded.seed if seed is None else seed,
        "prune": prune,
    }
    plan, base = _build_plan(
        loaded, fields, space, base, settings=settings, trials=trials, keep=keep, together=together
    )
    return _run_plan(plan, base, workers, replace=replace)


def _run_plan(plan: SweepPlan, base: Base | None, workers: int, *, replace: bool) -> SweepReport:
    # These import optuna, and take their time.
    from lora_kit.sweeps.sweep_report import check_out, finish_sweep
    from lora_kit.sweeps.trials import check_folder, open_study
    from lora_kit.sweeps.worker import Worker, run_workers

    check_folder(plan, replace=replace)
    check_out(plan, replace=replace)
    study = open_study(plan, replace=replace)
    try:
        if workers == 1:
            Worker(study, base=base).run()
        else:
            del base  # each worker loads its own
            run_workers(study, workers)
    except BaseException:
        logger.warning("stopped; the same command continues the sweep in %s", escape_text(plan.folder))
        raise
    return finish_sweep(study, replace=replace)


class SweepSettings(TypedDict):
    """What decides the values of the trials, and which one is the best; see `SweepPlan`."""

    method: str
    metric: str
    seed: int
    prune: str | None


def _build_plan(
    recipe: Recipe,
    fields: dict[str, object],
    space: Space,
    base: Base | None,
    *,
    settings: SweepSettings,
    trials: int | None,
    keep: str,
    together: int,
) -> tuple[SweepPlan, Base | None]:
    """Check everything that a trial needs, and return the plan with the base that trials can share."""
    from lora_kit.sweeps.sweep_plan import SweepPlan
    from lora_kit.sweeps.worker import can_share_base
    from lora_kit.training.together.train_many import refuse_experts

    combinations = list_combinations(space)
    _check_recipe(recipe, space, base, settings=settings)
    check_values(space, fields)
    if together > 1:
        check_trials_together(space, fields)
    check_output_writable(recipe)
    with silence_libraries():
        job = Job.open(recipe, base)
    if together > 1:
        refuse_experts(job.base)
    rows = _hash_train_rows(space, fields)
    plan = SweepPlan(
        out=str(recipe.out),
        fields=_as_plain(fields, recipe),
        over=format_space(space),
        trials=min(trials or len(combinations), len(combinations)) if combinations else trials or _DEFAULT_TRIALS,
        keep=keep,
        together=together,
        started_in=os.getcwd(),
        identity=as_json({**job.identity, "over": format_space(space), "files": rows, "sweep": settings}),
        **settings,
    )
    return plan, base or (job.base if can_share_base(recipe) else None)


def _check_arguments(
    *,
    base: Base | None,
    method: str | None,
    trials: int | None,
    seed: int | None,
    prune: str | None,
    keep: str,
    workers: int,
    together: int,
) -> None:
    if find_spec("optuna") is None:
        raise ConfigError("a sweep needs optuna, which is not installed", hint="pip install 'lora-kit[sweep]'")
    if method is not None:
        check_one_of("method", method, METHODS)
    if prune is not None:
        check_one_of("prune", prune, PRUNERS)
    check_one_of("keep", keep, KEEP)
    least_values = (("trials", trials, 1), ("seed", seed, 0), ("workers", workers, 1), ("together", together, 1))
    for name, value, least in least_values:
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}; {value} was given")
    if workers > 1 and base is not None:
        raise ConfigError("a loaded base cannot be shared by several workers", hint="leave base out")


def _read_recipe(
    recipe: str | Path | Mapping[str, object] | Recipe, overrides: Mapping[str, object] | None, metric: str | None
) -> tuple[dict[str, object], Recipe, str]:
    """Return the fields of a recipe whose evaluations compute the metric, the recipe itself, and the metric."""
    fields, _ = read_recipe_fields(recipe, overrides=overrides)
    loaded = load_recipe(fields)
    own = loaded.train.get("metric_for_best_model")
    default = "loss" if loaded.objective == SFT else TRL_OBJECTIVES[loaded.objective].best
    metric = metric or best_metric_of(loaded.train, default=default)
    if metric in _check_metric(metric, loaded) or (own and best_metric_of(loaded.train) == metric):
        return fields, loaded, metric
    if own:
        raise RecipeError(
            f"the recipe keeps the best weights by {own}, but trials are compared by {metric}",
            hint="choose one of the two, or leave train.metric_for_best_model out",
        )
    added: dict[str, object] = {"train.metric_for_best_model": metric}
    if not _evaluates(loaded):
        added["train.load_best_model_at_end"] = False  # there is one evaluation, at the end
    fields, _ = read_recipe_fields(fields, overrides=added)
    return fields, load_recipe(fields), metric


def _check_metric(metric: str, recipe: Recipe) -> tuple[str, ...]:
    """Return the metrics that every evaluation of this recipe measures, after a check that trials have this one."""
    if recipe.objective != SFT:
        spec = TRL_OBJECTIVES[recipe.objective]
        measured = ("loss", *spec.metrics) if spec.best == "loss" else tuple(spec.metrics)
        check_one_of("metric", metric, measured)
        return measured
    check_best_metric(metric, recipe.task, recipe.problem)
    return basic_metrics(recipe.task, recipe.problem)


def _evaluates(recipe: Recipe) -> bool:
    """Whether a recipe evaluates during its training, not only at its end."""
    return str(recipe.train.get("eval_strategy", "no")) != "no"


def _check_recipe(recipe: Recipe, space: Space, base: Base | None, *, settings: SweepSettings) -> None:
    if settings["method"] == "grid" and list_combinations(space) is None:
        raise RecipeError("a grid needs a list of values for every key; a range was given", hint="method random or tpe")
    if recipe.data.validation is None:
        raise RecipeError("a sweep compares trials on data.validation, and the recipe names none")
    if settings["prune"] and not _evaluates(recipe) and "train.eval_strategy" not in space:
        raise RecipeError(
            "prune compares evaluations during training, and train.eval_strategy is no",
            hint="set train.eval_strategy: steps, and train.eval_steps",
        )
    reloading = [key for key in ("base", "dtype", "quantize") if key in space]
    if base is not None and reloading:
        raise RecipeError(f"{reloading[0]} is swept, and a loaded base was given too", hint="leave base out")


def _as_plain(fields: Mapping[str, object], recipe: Recipe) -> dict[str, object]:
    """Return the fields of a recipe as JSON values; a `LoraConfig` among them by its fields."""
    return {
        key: recipe.to_dict()["lora"] if isinstance(value, LoraConfig) else as_json(value)
        for key, value in fields.items()
    }


def _hash_train_rows(space: Space, fields: Mapping[str, object]) -> dict[str, str]:
    """Return the sha256 of the rows of each swept value of `data.train`: other rows are another sweep."""
    sources = map(str, getattr(space.get("data.train"), "choices", ()))
    recipes = {source: load_recipe(fields, overrides={"data.train": source}) for source in sources}
    return {source: read_recipe_rows(recipe).hash_train() for source, recipe in recipes.items()}
