"""The trials of a sweep in optuna's journal: which there are, who works on them, how they ended.

A trial that is running is locked by the process that runs it. The lock goes with the process, however it ends, so a
running trial that nobody has locked is one to be gone on with. Its values were drawn from the sweep's seed, its number
and the trials before it, and are not drawn again.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import optuna
from optuna.samplers import BaseSampler, BruteForceSampler, RandomSampler, TPESampler
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from lora_kit.io.locks import FileLock
from lora_kit.io.read import folder_exists
from lora_kit.io.text import escape_text
from lora_kit.sweeps.space import Value, grid, size_of
from lora_kit.sweeps.sweep_plan import LOCKS, Plan

logger = logging.getLogger(__name__)

JOURNAL: Final = "journal.log"
_NAME: Final = "sweep"


class Study:
    """The trials of a plan, shared by every process that works on it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._locks = plan.folder / LOCKS
        self._alone = FileLock(self._locks / "sweep")
        with self._alone.held():
            self._optuna = _opened(plan, FileLock(self._locks / "journal"))

    @property
    def trials(self) -> list[FrozenTrial]:
        return self._optuna.get_trials(deepcopy=False)

    @property
    def done(self) -> list[FrozenTrial]:
        """Trials that ended, in their order."""
        return [trial for trial in self.trials if trial.state.is_finished()]

    @property
    def is_done(self) -> bool:
        return len(self.done) >= self.plan.trials

    @property
    def best(self) -> FrozenTrial | None:
        """The trial with the best value, the first of several; None while none has come through."""
        best: FrozenTrial | None = None
        for trial in self.trials:
            if trial.state == TrialState.COMPLETE and (best is None or self._beats(trial, best)):
                best = trial
        return best

    def _beats(self, one: FrozenTrial, other: FrozenTrial) -> bool:
        assert one.value is not None
        assert other.value is not None
        return self.plan.better(one.value, other.value)

    # Working on one

    @contextlib.contextmanager
    def next(self) -> Iterator[FrozenTrial | None]:
        """A trial for this process alone: one that was left behind, or a new one; None where there is none left."""
        with self._alone.held():
            claimed = self._left_behind() or self._new()
        if claimed is None:
            yield None
            return
        trial, lock = claimed
        try:
            yield trial
        finally:
            lock.release()

    def _left_behind(self) -> tuple[FrozenTrial, FileLock] | None:
        for trial in self.trials:
            if trial.state == TrialState.RUNNING:
                lock = self._lock(trial.number)
                if lock.acquire_now():
                    logger.info("going on with trial %d", trial.number)
                    return trial, lock
        return None

    def _new(self) -> tuple[FrozenTrial, FileLock] | None:
        trials = self.trials
        if len(trials) >= self.plan.trials:
            return None
        space = {key: values.distribution() for key, values in self.plan.space.items()}
        params = proposed(self.plan, trials)
        lock = self._lock(len(trials))
        lock.acquire()
        self._optuna.add_trial(create_trial(state=TrialState.RUNNING, params=params, distributions=space))
        return self.trials[-1], lock

    def _lock(self, number: int) -> FileLock:
        return FileLock(self._locks / str(number))

    def handle(self, trial: FrozenTrial) -> optuna.Trial:
        """A trial as optuna has it written to."""
        return optuna.Trial(self._optuna, trial._trial_id)

    def end(
        self, trial: FrozenTrial, state: TrialState, *, value: float | None = None, facts: Mapping[str, Any]
    ) -> None:
        """Write down how a trial ended; results that can no longer be the best go."""
        with self._alone.held():
            handle = self.handle(trial)
            for key, fact in facts.items():
                handle.set_user_attr(key, fact)
            self._optuna.tell(trial.number, value, state=state)
            if self.plan.keep == "best":
                self._tidy()

    def _tidy(self) -> None:
        best = self.best
        for trial in self.done:
            home = self.plan.home(trial.number)
            if (best is None or trial.number != best.number) and folder_exists(home):
                shutil.rmtree(home)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other process begins or ends a trial meanwhile."""
        with self._alone.held():
            yield


def _opened(plan: Plan, lock: FileLock) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = plan.folder / JOURNAL
    with lock.held():
        _mend(path)
    backend = JournalFileBackend(str(path), lock_obj=lock)  # type: ignore[arg-type]
    return optuna.create_study(
        storage=JournalStorage(backend),
        study_name=_NAME,
        direction=plan.direction,
        load_if_exists=True,
        sampler=RandomSampler(plan.seed),
        pruner=optuna.pruners.MedianPruner() if plan.prune else optuna.pruners.NopPruner(),
    )


def _mend(path: Path) -> None:
    """Take a last line off a journal that was not written to its end: nothing could be written after it."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            logger.warning("%s ended within a line, which is left out", escape_text(path))
            file.truncate(whole)


def proposed(plan: Plan, trials: Sequence[FrozenTrial]) -> dict[str, Value]:
    """The values of the trial after these: what the plan says, and nothing that this process has done before."""
    if plan.method == "grid":
        return next(islice(grid(plan.space), len(trials), None))
    seed = int(np.random.SeedSequence([plan.seed, len(trials)]).generate_state(1)[0])
    finite = size_of(plan.space) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # Of a finite space everything is tried once, whatever the method.
        once = BruteForceSampler(seed) if finite else RandomSampler(seed)
    if plan.method == "random":
        return _asked(plan, once, trials)
    found = _asked(plan, TPESampler(seed=seed, constant_liar=True), trials)
    tried = any(trial.params == found for trial in trials)
    return _asked(plan, once, trials) if finite and tried else found


def _asked(plan: Plan, sampler: BaseSampler, trials: Sequence[FrozenTrial]) -> dict[str, Value]:
    scratch = optuna.create_study(direction=plan.direction, sampler=sampler)
    scratch.add_trials(trials)
    return scratch.ask({key: values.distribution() for key, values in plan.space.items()}).params
