"""The trials of a sweep in Optuna's journal: which there are, which process runs each, and how they ended.

adapters/sql.sweep/
    plan.json       what is swept, how, and on which rows and base
    recipe.yaml     the recipe as it was given
    journal.log     Optuna's journal: every trial with its values, its evaluations and its result
    trials/3/sql    a trial's adapter, while it may still be the best one
    locks/          which process runs which trial
    results.json    the trials once all have ended, and results.png, the same as a picture
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import optuna
import yaml
from optuna.pruners import MedianPruner, NopPruner
from optuna.samplers import RandomSampler
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from lora_kit.errors import AdapterError, LoraKitError, RecipeError, StorageError
from lora_kit.io.atomic_write import write_file
from lora_kit.io.locks import FileLock
from lora_kit.io.read import exists, folder_exists, mode_of
from lora_kit.io.text import escape_text, shorten
from lora_kit.names import RECIPE_FILE
from lora_kit.runs.sweep_status import SWEEP_JOURNAL, SWEEP_LOCKS, SWEEP_PLAN
from lora_kit.sweeps.sweep_plan import SweepPlan, propose_params, read_plan
from lora_kit.training.loop.run_differences import describe_differences

logger = logging.getLogger(__name__)
optuna.logging.set_verbosity(optuna.logging.WARNING)

_NAME: Final = "sweep"


class SweepStudy:
    """The trials of a plan, shared by every process that works on it.

    Optuna's journal has no heartbeat, so a process that runs a trial holds a lock on `locks/<number>`. The operating
    system frees the lock when the process ends, however it ends. A running trial whose lock is free was therefore left
    behind, and the next process continues it, under its number and with its values.
    """

    def __init__(self, plan: SweepPlan) -> None:
        self.plan = plan
        self._alone = FileLock(plan.folder / SWEEP_LOCKS / "sweep")
        self._locks: dict[int, FileLock] = {}  # of the trials that this process runs
        with _translate_damage(plan.folder / SWEEP_JOURNAL):
            self._optuna = optuna.create_study(
                storage=_open_storage(plan.folder),
                study_name=_NAME,
                direction=plan.direction,
                load_if_exists=True,
                sampler=RandomSampler(plan.seed),  # never asked: `propose_params` draws the values
                pruner=MedianPruner() if plan.prune else NopPruner(),
            )
            _check_params(plan, self._optuna.get_trials(deepcopy=False))

    @property
    def trials(self) -> list[FrozenTrial]:
        """Every trial, by number."""
        self._check_folder_exists()
        return self._optuna.get_trials(deepcopy=False)

    @property
    def ended(self) -> list[FrozenTrial]:
        """The trials that ended, by number."""
        return [trial for trial in self.trials if trial.state.is_finished()]

    @property
    def is_done(self) -> bool:
        return len(self.ended) >= self.plan.trials

    @property
    def best(self) -> FrozenTrial | None:
        """The trial with the best value, the first of equal ones; None while none is complete."""
        with contextlib.suppress(ValueError):
            return self._optuna.best_trial
        return None

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Let no other process begin or end a trial during the block."""
        with self._alone.hold():
            self._check_folder_exists()
            yield

    def _check_folder_exists(self) -> None:
        """Raise StorageError if the sweep's folder was removed: Optuna would write a new journal and wait for ever."""
        if not exists(self.plan.folder / SWEEP_PLAN):
            folder = escape_text(self.plan.folder)
            raise StorageError(f"{folder} was removed while its trials ran", hint="start the sweep again")

    @contextlib.contextmanager
    def claim_trials(self, most: int = 1) -> Iterator[list[optuna.Trial]]:
        """Give this process trials that no other one runs: those left behind, then new ones; none if all have begun."""
        claimed: list[optuna.Trial] = []
        try:
            with self.exclusive():
                while len(claimed) < most and (trial := self._claim_left_behind() or self._claim_new()):
                    claimed.append(optuna.Trial(self._optuna, trial._trial_id))
            yield claimed
        finally:
            for lock in self._locks.values():
                lock.release()
            self._locks.clear()

    def _claim_left_behind(self) -> FrozenTrial | None:
        for trial in self.trials:
            lock = self._lock_of(trial.number)
            if trial.state == TrialState.RUNNING and lock.acquire_now():
                self._locks[trial.number] = lock
                logger.info("continuing trial %d", trial.number)
                return trial
        return None

    def _claim_new(self) -> FrozenTrial | None:
        trials = self.trials
        if len(trials) >= self.plan.trials:
            return None
        params = propose_params(self.plan, trials)
        lock = self._lock_of(len(trials))
        lock.acquire()
        self._locks[len(trials)] = lock
        # One line of the journal, where `ask` writes one for each value: no kill can leave a trial with half of them.
        self._optuna.add_trial(
            create_trial(state=TrialState.RUNNING, params=params, distributions=dict(self.plan.space))
        )
        return self.trials[-1]

    def _lock_of(self, number: int) -> FileLock:
        return FileLock(self.plan.folder / SWEEP_LOCKS / str(number))

    def end_trial(
        self, trial: optuna.Trial, state: TrialState, *, value: float | None = None, facts: Mapping[str, object]
    ) -> None:
        """Record how a trial of this process ended, and remove the results that can no longer be the best."""
        with self.exclusive():
            for key, fact in facts.items():
                trial.set_user_attr(key, fact)
            self._optuna.tell(trial.number, value, state=state)
            if self.plan.keep == "best":
                best = self.best
                self.remove_results(but=None if best is None else best.number)
        self._locks.pop(trial.number).release()

    def remove_results(self, *, but: int | None = None) -> None:
        """Remove the results of the trials that ended, except one's."""
        for trial in self.ended:
            folder = self.plan.trial_folder(trial.number)
            if trial.number != but and folder_exists(folder):
                shutil.rmtree(folder)


# The folder


def open_study(plan: SweepPlan, *, replace: bool) -> SweepStudy:
    """Open the study of a plan in its folder, or begin it there.

    Raises:
        RecipeError: the folder holds another sweep, which may not be replaced; names what differs.
        StorageError: it may be replaced, and a process works on it.
    """
    with FileLock(plan.folder / SWEEP_LOCKS / "sweep").hold():
        if check_folder(plan, replace=replace):
            _clear_folder(plan.folder)
        # Of a sweep that continues, the journal is read first: where that is damaged, nothing is changed.
        study = SweepStudy(plan) if exists(plan.folder / SWEEP_PLAN) else None
        recipe = yaml.safe_dump(dict(plan.fields), sort_keys=False, allow_unicode=True, width=120)
        write_file(plan.folder / RECIPE_FILE, recipe.encode())
        write_file(plan.folder / SWEEP_PLAN, json.dumps(dataclasses.asdict(plan), indent=1).encode())
        return study or SweepStudy(plan)


def check_folder(plan: SweepPlan, *, replace: bool) -> list[str]:
    """Return what differs from the sweep that the plan's folder holds.

    Raises:
        RecipeError: something differs, and that sweep may not be replaced.
    """
    if not exists(plan.folder / SWEEP_PLAN):
        return []
    try:
        differences = list(describe_differences(read_plan(plan.folder).identity, plan.identity))
    except AdapterError as error:
        differences = [error.message]
    if differences and not replace:
        raise RecipeError(
            f"{escape_text(plan.folder)} holds another sweep:\n  " + "\n  ".join(differences),
            hint="go back to that one to continue it, or ask to replace (--replace) to start anew",
        )
    return differences


def _clear_folder(folder: Path) -> None:
    locks = [FileLock(path) for path in (folder / SWEEP_LOCKS).iterdir() if path.name.isdecimal()]
    if any(lock.is_held for lock in locks):
        raise StorageError(f"another process works on {escape_text(folder)}", hint="wait for it, or stop it")
    # Last the plan: with it gone, the trials of the old sweep would be taken for those of the new one. The locks stay:
    # this process holds one.
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == SWEEP_PLAN):
        if entry.name != SWEEP_LOCKS:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _open_storage(folder: Path) -> JournalStorage:
    path = folder / SWEEP_JOURNAL
    # Optuna's own locks are files that a killed process leaves there: the others would wait 30 seconds for it.
    lock = FileLock(folder / SWEEP_LOCKS / "journal")
    with lock.hold():
        _drop_partial_line(path)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))  # type: ignore[arg-type]


@contextlib.contextmanager
def _translate_damage(journal: Path) -> Iterator[None]:
    """Raise AdapterError for whatever Optuna raises in the block, which only reads the journal."""
    try:
        yield
    except (LoraKitError, OSError):
        raise
    except Exception as error:  # a line may be anything, and Optuna trusts it
        what = f"{escape_text(journal)} is damaged: {type(error).__name__}: {shorten(error)}"
        raise AdapterError(what, hint="remove the folder to start anew") from None


def _check_params(plan: SweepPlan, trials: Sequence[FrozenTrial]) -> None:
    """Raise KeyError for a trial that has a value of a key that the plan does not vary, or lacks one."""
    for trial in trials:
        if trial.params.keys() != dict(plan.space).keys():
            raise KeyError(f"trial {trial.number} has values of {sorted(trial.params)}")


def _drop_partial_line(path: Path) -> None:
    """Remove an unfinished last line of a journal: Optuna would append to it, and could read neither line.

    Raises:
        AdapterError: there is something else than a file.
    """
    if not exists(path):
        return
    if not stat.S_ISREG(mode_of(path, follow=False)):
        raise AdapterError(f"{escape_text(path)} is not a regular file", hint="remove the folder to start anew")
    with open(path, "r+b") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            logger.warning("%s ends with an unfinished line, which is dropped", escape_text(path))
            file.truncate(whole)
