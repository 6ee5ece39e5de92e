"""One process that works on a sweep: trial after trial, until none is left."""

from __future__ import annotations

import logging
import time
from typing import Any, Final

from optuna.trial import FrozenTrial, TrialState
from transformers import TrainerCallback

from lora_kit.errors import LoraKitError, StorageError
from lora_kit.io.text import escape_text
from lora_kit.models.loading import Base
from lora_kit.models.silence import silence_libraries
from lora_kit.sweeps.study import Study
from lora_kit.sweeps.sweep_plan import Plan, shares_base
from lora_kit.training.job.job import Job
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.recipe.recipe import Recipe
from lora_kit.training.train import train

logger = logging.getLogger(__name__)

PRUNED_AT: Final = "pruned_at"
_POLL_SECONDS: Final = 0.2
_MACHINE: Final = 3
_LOADED_AS: Final = ("base", "task", "dtype", "quantize")
"""Fields of a recipe that decide how a base is loaded."""


class Worker:
    """Runs the trials of a plan that nobody else runs.

    Args:
        base: of the recipe; None to load it when it is first needed.
    """

    def __init__(self, plan: Plan, *, base: Base | None = None) -> None:
        self._plan, self._study, self._base = plan, Study(plan), base
        self._recipe = load_recipe(plan.fields)
        self._told: set[int] = {trial.number for trial in self._study.done}

    @property
    def is_done(self) -> bool:
        return self._study.is_done

    def run(self) -> None:
        """Work until every trial has ended, those of other processes too: one of them may die."""
        while not self.is_done:
            self.check_there()
            with self._study.next() as trial:
                if trial is None:
                    time.sleep(_POLL_SECONDS)
                else:
                    self._run(trial)
            self.tell()

    def check_there(self) -> None:
        """Raise StorageError where the sweep's folder is gone: nothing that others end would be seen any more."""
        if not self._plan.folder.is_dir():
            raise StorageError(f"{escape_text(self._plan.folder)} was removed while its trials ran", hint="begin again")

    def tell(self) -> None:
        """Log the trials that have ended since the last time."""
        for trial in self._study.done:
            if trial.number not in self._told:
                self._told.add(trial.number)
                logger.info("%s; %s", line(self._plan, trial), self._standing())

    def _standing(self) -> str:
        best, done = self._study.best, f"{len(self._told)} of {self._plan.trials} done"
        return done if best is None else f"{done}, best: trial {best.number} with {best.value:.5g}"

    def _run(self, trial: FrozenTrial) -> None:
        if PRUNED_AT in trial.user_attrs:  # decided before the process died
            self._study.end(trial, TrialState.PRUNED, facts={"steps": trial.user_attrs[PRUNED_AT]})
            return
        reports = _Reports(self._study, trial, metric=self._plan.metric)
        try:
            recipe = self._plan.recipe(trial.number, trial.params)
            report = train(recipe, base=self._base_for(recipe), replace=True, callbacks=[reports])
        except LoraKitError as error:
            # What the machine cannot do may go well later. What these values lead to is a result.
            if error.exit_code == _MACHINE:
                raise
            self._study.end(trial, TrialState.FAIL, facts={"error": str(error)})
            return
        assert report.after is not None
        facts = {"steps": report.steps, "seconds": round(report.seconds, 3), "metrics": report.after.metrics()}
        if reports.pruned:
            self._study.end(trial, TrialState.PRUNED, facts=facts)
        else:
            value = report.after.metrics()[self._plan.metric]
            self._study.end(trial, TrialState.COMPLETE, value=value, facts=facts)

    def _base_for(self, recipe: Recipe) -> Base | None:
        """The base that all trials share; None for a trial that loads its own."""
        given = self._recipe
        if any(getattr(recipe, name) != getattr(given, name) for name in _LOADED_AS):
            return None
        if self._base is None and shares_base(recipe):
            with silence_libraries():
                self._base = Job.open(given).base
        return self._base


class _Reports(TrainerCallback):
    """Writes the evaluations of a trial down, and stops it where it is worse than others were by then.

    A trial that goes on after its process died evaluates some steps again: they have been decided upon.
    """

    def __init__(self, study: Study, trial: FrozenTrial, *, metric: str) -> None:
        self._trial, self._metric = study.handle(trial), metric
        self._reported = max(trial.intermediate_values, default=0)
        self._prunes = study.plan.prune is not None

    @property
    def pruned(self) -> bool:
        return PRUNED_AT in self._trial.user_attrs

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        step = state.global_step
        if not self._prunes or not 0 < step < state.max_steps or step < self._reported:
            return
        if step > self._reported:
            self._trial.report(metrics[f"eval_{self._metric}"], step)
            self._reported = step
        if self._trial.should_prune():
            self._trial.set_user_attr(PRUNED_AT, step)
            control.should_training_stop = True


def line(plan: Plan, trial: FrozenTrial) -> str:
    """How a trial ended, in words."""
    values = ", ".join(f"{key} {shown(value)}" for key, value in trial.params.items())
    how = {
        TrialState.COMPLETE: f"{plan.metric} {trial.value or 0:.5g}",
        TrialState.PRUNED: f"pruned at {plan.metric} {trial.value or 0:.5g}",
        TrialState.FAIL: f"failed: {trial.user_attrs.get('error')}",
    }[trial.state]
    return f"trial {trial.number}: {how} ({values})"


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
