"""The plan of a sweep: its settings, as `plan.json` has them, and the values that each trial gets."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import optuna
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from lora_kit.errors import AdapterError
from lora_kit.io.read import read_json
from lora_kit.io.text import escape_text
from lora_kit.names import SWEEP_SUFFIX
from lora_kit.runs.sweep_status import SWEEP_PLAN, SWEEP_TRIALS
from lora_kit.sweeps.space import Params, Value, list_combinations, parse_space
from lora_kit.training.loop.checkpoints import hash_json
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.recipe.recipe import Recipe
from lora_kit.training.recipe.training_arguments import is_greater_better

if TYPE_CHECKING:
    from lora_kit.sweeps.space import Space

_PLAN_LIMIT: Final = 2**23
"""Bytes."""


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """A sweep whose settings are checked. Its fields are the JSON values of `plan.json`.

    Attributes:
        out: folder of the best trial's result.
        fields: the recipe as it was given, without defaults.
        over: the values or the range of each swept recipe key, as `parse_space` reads them.
        method: `grid`, `random` or `tpe`.
        metric: of the validation rows, by which trials are compared.
        trials: how many.
        seed: decides the values of every trial.
        prune: `median`, or None.
        keep: `best`, or `all` trials' results.
        identity: what decides the result of every trial: settings, recipe, rows, base.
        together: trials that a process trains at once.
        started_in: working directory in which it was started, from which relative paths are meant.
    """

    out: str
    fields: Mapping[str, object]
    over: Mapping[str, list[Value] | str]
    method: str
    metric: str
    trials: int
    seed: int
    prune: str | None
    keep: str
    identity: Mapping[str, object]
    together: int = 1
    started_in: str = ""

    @property
    def folder(self) -> Path:
        out = Path(self.out)
        return out.with_name(f"{out.name}{SWEEP_SUFFIX}")

    @cached_property
    def space(self) -> Space:
        return parse_space(self.over)

    @property
    def digest(self) -> str:
        """sha256 of the identity. The number of trials is no part of it, so that there may be more later."""
        return hash_json(self.identity)

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        return "maximize" if is_greater_better(self.metric) else "minimize"

    def trial_folder(self, number: int) -> Path:
        return self.folder / SWEEP_TRIALS / str(number)

    def trial_out(self, number: int) -> Path:
        """Return the folder of a trial's adapter (or model); it is named as `out` is."""
        return self.trial_folder(number) / Path(self.out).name

    def build_recipe(self, number: int, params: Params) -> Recipe:
        """Return the recipe of a trial.

        Raises:
            RecipeError: the values do not go together.
        """
        return load_recipe(self.fields, overrides={**params, "out": str(self.trial_out(number))})


def read_plan(folder: Path) -> SweepPlan:
    """Return the plan of the sweep in a folder.

    Raises:
        AdapterError: the file is missing or damaged.
    """
    fields = read_json(folder / SWEEP_PLAN, limit=_PLAN_LIMIT)
    try:
        return SweepPlan(**fields)
    except TypeError:
        raise AdapterError(f"{escape_text(folder / SWEEP_PLAN)} is damaged") from None


def propose_params(plan: SweepPlan, trials: Sequence[FrozenTrial]) -> dict[str, Value]:
    """Return the values of the trial that follows these.

    They depend on the plan and on these trials only, so a sweep that was stopped proposes what it would have proposed.
    Each trial has a sampler of its own seed for that reason. A finite space is walked without one, since Optuna's
    `GridSampler` tries combinations again when processes share a study.
    """
    combinations = list_combinations(plan.space)
    if combinations is None:
        return _sample(plan, trials)
    if plan.method == "grid":
        return combinations[len(trials)]
    tried = [trial.params for trial in trials]
    untried = [params for params in combinations if params not in tried]
    proposed = _sample(plan, trials) if plan.method == "tpe" else None
    return proposed if proposed in untried else random.Random(_seed_of(plan, len(trials))).choice(untried)


def _sample(plan: SweepPlan, trials: Sequence[FrozenTrial]) -> dict[str, Value]:
    seed = _seed_of(plan, len(trials))
    sampler = TPESampler(seed=seed, constant_liar=True) if plan.method == "tpe" else RandomSampler(seed)
    scratch = optuna.create_study(direction=plan.direction, sampler=sampler)
    scratch.add_trials(trials)
    return scratch.ask(dict(plan.space)).params


def _seed_of(plan: SweepPlan, number: int) -> int:
    return int(np.random.SeedSequence([plan.seed, number]).generate_state(1)[0])
