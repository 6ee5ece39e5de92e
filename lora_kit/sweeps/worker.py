"""The processes that work on a sweep: each runs trial after trial, until none is left."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import optuna
from optuna.trial import FrozenTrial, TrialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_kit.cpu_threads import count_cores
from lora_kit.errors import LoraKitError, StorageError, VerificationError, format_list
from lora_kit.io.text import escape_text
from lora_kit.models.loading import Base
from lora_kit.models.silence import silence_libraries
from lora_kit.sweeps.sweep_plan import SweepPlan, read_plan
from lora_kit.sweeps.trials import SweepStudy
from lora_kit.training.job.job import Job
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.recipe.recipe import METHODS_CHANGING_BASE, Recipe
from lora_kit.training.together.train_many import JointTraining, train_together
from lora_kit.training.train import train

logger = logging.getLogger(__name__)

_PRUNED_AT: Final = "pruned_at"
_POLL_SECONDS: Final = 0.2
_LOADING_FIELDS: Final = ("base", "task", "dtype", "quantize")
"""Fields of a recipe that decide how a base is loaded."""


class Worker:
    """Runs the trials of a study that no other process runs.

    Args:
        base: the recipe's base; None to load it when it is first needed.
    """

    def __init__(self, study: SweepStudy, *, base: Base | None = None) -> None:
        self._study, self._plan, self._base = study, study.plan, base
        self._recipe = load_recipe(study.plan.fields)
        self._log = _TrialLog(study)

    def run(self) -> None:
        """Work until every trial has ended, those of other processes too: one of them may die."""
        while not self._study.is_done:
            with self._study.claim_trials(self._plan.together) as trials:
                runs = [run for run in map(self._prepare_trial, trials) if run is not None]
                if not trials:
                    time.sleep(_POLL_SECONDS)
                elif len(runs) > 1:
                    self._train_together(runs)
                for run in runs if len(runs) == 1 else []:
                    self._train_alone(run)
            self._log.update()

    def _prepare_trial(self, trial: optuna.Trial) -> JointTraining | None:
        """Return the training of a trial; None where it has ended without one."""
        if _PRUNED_AT in trial.user_attrs:  # decided before its process died
            self._study.end_trial(trial, TrialState.PRUNED, facts={"steps": trial.user_attrs[_PRUNED_AT]})
            return None

        def end_trial(training: JointTraining) -> None:
            self._end_trial(trial, training)

        callbacks = (_ReportEvaluations(self._study, trial),)
        try:
            recipe = self._plan.build_recipe(trial.number, trial.params)
        except LoraKitError as error:
            self._study.end_trial(trial, TrialState.FAIL, facts={"error": str(error)})
            return None
        return JointTraining(recipe, callbacks=callbacks, on_end=end_trial)

    def _train_alone(self, run: JointTraining) -> None:
        with run.note_end():
            base = self._load_base(run.recipe)
            run.report = train(run.recipe, base=base, replace=True, callbacks=run.callbacks)
        _raise_failure(run)

    def _train_together(self, runs: Sequence[JointTraining]) -> None:
        train_together(runs, base=self._load_base(runs[0].recipe), replace=True, together=len(runs))
        for run in runs:
            _raise_failure(run)

    def _end_trial(self, trial: optuna.Trial, run: JointTraining) -> None:
        """Record what became of a trial's training, unless the trial may go on later."""
        if run.error is not None:
            if _is_result(run.error):
                self._study.end_trial(trial, TrialState.FAIL, facts={"error": str(run.error)})
            return
        report = run.report
        assert report is not None
        assert report.after is not None
        metrics = report.after.metrics()
        facts = {"steps": report.steps, "seconds": round(report.seconds, 3), "metrics": metrics}
        pruned = _PRUNED_AT in trial.user_attrs
        state, value = (TrialState.PRUNED, None) if pruned else (TrialState.COMPLETE, metrics[self._plan.metric])
        self._study.end_trial(trial, state, value=value, facts=facts)
        self._log.update()

    def _load_base(self, recipe: Recipe) -> Base | None:
        """Return the base that the trials share; None for a trial that loads its own."""
        shared = self._recipe
        if any(getattr(recipe, name) != getattr(shared, name) for name in _LOADING_FIELDS):
            return None
        if self._base is None and can_share_base(recipe):
            with silence_libraries():
                self._base = Job.open(shared).base
        return self._base


def _is_result(error: Exception) -> bool:
    """Whether an error follows from the values of a trial. What the machine failed at may succeed later."""
    return isinstance(error, LoraKitError) and error.exit_code != StorageError.exit_code


def _raise_failure(run: JointTraining) -> None:
    if run.error is not None and not _is_result(run.error):
        raise run.error


def can_share_base(recipe: Recipe) -> bool:
    """Whether trainings of a recipe can share one loaded base; the others change what they load."""
    return recipe.dtype == "auto" and recipe.quantize is None and recipe.method not in METHODS_CHANGING_BASE


class _ReportEvaluations(TrainerCallback):
    """Reports the evaluations of a trial to Optuna's pruner, and stops the training if the pruner says so.

    A trial that is continued after its process died repeats some evaluations: those are decided already.
    """

    def __init__(self, study: SweepStudy, trial: optuna.Trial) -> None:
        self._trial, self._plan = trial, study.plan
        self._reported_step = max(study.trials[trial.number].intermediate_values, default=0)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        step = state.global_step
        if self._plan.prune is None or not 0 < step < state.max_steps or step < self._reported_step:
            return
        if step > self._reported_step:
            assert metrics is not None
            self._trial.report(metrics[f"eval_{self._plan.metric}"], step)
            self._reported_step = step
        if self._trial.should_prune():
            self._trial.set_user_attr(_PRUNED_AT, step)
            control.should_training_stop = True


class _TrialLog:
    """Logs a line for every trial that ends, whichever process ran it."""

    def __init__(self, study: SweepStudy) -> None:
        self._study = study
        self._logged = {trial.number for trial in study.ended}

    def update(self) -> None:
        """Log the trials that ended since the last call."""
        for trial in self._study.ended:
            if trial.number not in self._logged:
                self._logged.add(trial.number)
                best = self._study.best
                leader = "" if best is None else f", best: trial {best.number} with {best.value:.5g}"
                count = f"{len(self._logged)} of {self._study.plan.trials} done"
                logger.info("%s; %s%s", _describe_trial(trial, self._study.plan.metric), count, leader)


def _describe_trial(trial: FrozenTrial, metric: str) -> str:
    result = f"failed: {trial.user_attrs.get('error')}" if trial.value is None else f"{metric} {trial.value:.5g}"
    pruned = "pruned at " if trial.state == TrialState.PRUNED else ""
    params = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
              for key, value in trial.params.items())  # fmt: skip
    return f"trial {trial.number}: {pruned}{result} ({', '.join(params)})"


# Several processes


def run_workers(study: SweepStudy, count: int) -> None:
    """Run the trials of a study in several processes, until every trial has ended.

    Raises:
        VerificationError: every worker ended before the sweep did.
        StorageError: the sweep's folder was removed.
    """
    log = _TrialLog(study)
    with _start_workers(study.plan, count) as processes:
        while not study.is_done:
            log.update()
            if all(process.poll() is not None for process in processes):
                break
            time.sleep(_POLL_SECONDS)
        for number, process in enumerate(processes):
            if process.poll():
                path = escape_text(_log_path(study.plan, number))
                logger.warning("worker %d ended early, with code %d; see %s", number, process.returncode, path)
    log.update()
    if not study.is_done:
        last = [line for number in range(count) for line in _log_path(study.plan, number).read_text().splitlines()[-1:]]
        raise VerificationError(f"all {count} workers ended before the sweep did: {format_list(last)}")


@contextlib.contextmanager
def _start_workers(plan: SweepPlan, count: int) -> Iterator[Sequence[subprocess.Popen[bytes]]]:
    """Start worker processes, and end them with the block: each completes its training step first.

    They have sessions of their own. Otherwise an interrupt from the terminal would reach them besides the signal of
    this process, and a second signal ends a training within its step.
    """
    threads = str(max(1, count_cores() // count))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "lora_kit.sweeps", str(plan.folder), str(os.getpid())]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(count):
            with open(_log_path(plan, number), "wb") as log:
                processes.append(
                    subprocess.Popen(
                        command,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait()


def _log_path(plan: SweepPlan, number: int) -> Path:
    return plan.folder / f"worker-{number}.log"


def run_worker_process(folder: str, parent: str) -> int:
    """Work on the sweep in a folder until every trial has ended, or the parent process has."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("lora_kit").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    threading.Thread(target=_end_with_parent, args=(int(parent),), daemon=True).start()
    try:
        Worker(SweepStudy(read_plan(Path(folder)))).run()
    except LoraKitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _end_with_parent(parent: int) -> None:
    """Signal this process as soon as its parent is gone, killed perhaps: nobody would end this worker later."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
