"""Training: a recipe in, an adapter folder (or a model folder) out; the base is unchanged."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from lora_kit.cpu_threads import describe_cpu_threads
from lora_kit.data.mixture import has_text_pairs
from lora_kit.errors import LoraKitError, RecipeError, format_list
from lora_kit.evaluation.forward import run_forward
from lora_kit.evaluation.measure import Evaluation
from lora_kit.evaluation.thresholds import choose_thresholds
from lora_kit.io.atomic_write import lock_output
from lora_kit.models.loading import Base
from lora_kit.models.silence import silence_libraries
from lora_kit.models.tasks import MULTI_LABEL
from lora_kit.runs.run_files import RunProgress
from lora_kit.torch_utils import Clock
from lora_kit.training.job.job import Job
from lora_kit.training.job.methods import TrainableJob, make_job_trainable
from lora_kit.training.job.output import check_output_available, check_output_writable
from lora_kit.training.loop.checkpoints import Checkpoint, RunFolder, hash_json
from lora_kit.training.loop.contexts import set_up_training
from lora_kit.training.loop.oom_retry import translate_training_memory
from lora_kit.training.loop.run_log import RunLog, end_run_log
from lora_kit.training.loop.sharded_base import shard_base
from lora_kit.training.loop.signals import StopRequest
from lora_kit.training.loop.world import World, join_world
from lora_kit.training.recipe.coerce import Section
from lora_kit.training.recipe.load import RecipeSource, load_recipe
from lora_kit.training.recipe.objectives import SFT
from lora_kit.training.recipe.recipe import Recipe
from lora_kit.training.recipe.sharding_checks import is_base_sharded
from lora_kit.training.report.artifacts import build_result_files
from lora_kit.training.report.samples import SampleAnswers
from lora_kit.training.results import TrainReport, build_history

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from lora_kit.training.loop.resumable import ResumableLoop

logger = logging.getLogger(__name__)

TENSORBOARD_SUFFIX: Final = ".tensorboard"
"""TensorBoard's files are in the folder `<out>.tensorboard`, unless TENSORBOARD_LOGGING_DIR is set."""


def train(
    recipe: RecipeSource,
    *,
    base: Base | None = None,
    overrides: Section | None = None,
    replace: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainReport:
    """Train what a recipe describes and write the result to its `out`, all or nothing.

    The same recipe with the same seed gives the same adapter bytes on the same machine. Checkpoints are kept in a
    folder beside `out` until the result is saved. A training that was stopped resumes from the last one when it is
    started again, and ends with the same bytes.

    Args:
        recipe: a YAML or TOML file, what stands in one, or a Recipe.
        base: a base that is already loaded, unchanged afterwards, bit for bit; None to load the recipe's.
        overrides: values by dotted key (`lora.r`, `train.learning_rate`), which win over the recipe.
        replace: whether an earlier result at `out`, and checkpoints of another recipe, may be replaced.
        callbacks: further callbacks of transformers.

    Raises:
        RecipeError, DataError, BaseModelError, TargetError: the recipe, its data or its base is invalid, or differs
            from those of the checkpoints; nothing was trained.
        StorageError: `out` exists, cannot be written, or another process trains it; or there is not enough memory.
        VerificationError: the loss became NaN or infinite; nothing is written.
    """
    with join_world() as world:
        loaded = load_recipe(recipe, overrides=overrides)
        check_output_writable(loaded)
        folder = RunFolder(loaded.out)
        world.describe_resume = folder.describe_resume
        with world.on_first(lock_output(folder.folder)), silence_libraries():
            world.ask_first(lambda: _check_output(folder, loaded, replace=replace))
            job = Job.open(loaded, base, store=folder.samples if world.is_first else None, processes=world.size)
            _check_same_run(job, world)
            checkpoint = world.ask_first(lambda: folder.find_resumable(job.identity, job.environment, replace=replace))
            stop = StopRequest(alone=world.size == 1)
            run = StartedRun(folder, world, checkpoint, stop, callbacks=tuple(callbacks))
            return train_job(job, run, replace=replace)


@dataclass(frozen=True)
class StartedRun:
    """A training as it is started.

    Attributes:
        folder: of its checkpoints, which no other run writes to.
        world: its processes.
        checkpoint: from which it resumes; None for the beginning.
        stop: asked after every step whether to save and stop.
        callbacks: further callbacks of transformers.
        join: called with the loop; the context lasts while it trains.
        shows_bar: whether progress is shown as a live line on a terminal.
    """

    folder: RunFolder
    world: World
    checkpoint: Checkpoint | None
    stop: StopRequest
    callbacks: tuple[TrainerCallback, ...] = ()
    join: Callable[[ResumableLoop], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    shows_bar: bool = True


def train_job(job: Job, run: StartedRun, *, replace: bool) -> TrainReport:
    """Train a job, or go on with it from a checkpoint, and write its result.

    Args:
        replace: whether an earlier result may be replaced.

    Raises:
        LoraKitError: as `train`, after the job was opened.
    """
    try:
        with translate_training_memory(), make_job_trainable(job) as trainable:
            report = _train_and_save(trainable, run, replace=replace)
    except BaseException as error:
        run.folder.log_resume_point()
        if run.world.is_first:
            end_run_log(run.folder.folder, error, keep=run.folder.has_checkpoint)
        raise
    run.world.ask_first(run.folder.remove)
    return report


def _check_output(folder: RunFolder, recipe: Recipe, *, replace: bool) -> None:
    folder.remove_if_done()
    check_output_available(recipe, replace=replace)


def _check_same_run(job: Job, world: World) -> None:
    """Raise RecipeError where a process has read another recipe, other rows or another base than the first."""
    runs = world.gather(hash_json(job.identity))
    others = [rank for rank, run in enumerate(runs) if run != runs[0]]
    if others:
        what = f"process {others[0]} has another recipe, other rows or another base than the first process"
        raise RecipeError(what, hint="every machine needs the same files")


def _train_and_save(trainable: TrainableJob, run: StartedRun, *, replace: bool) -> TrainReport:
    job = trainable.job
    is_shared = is_base_sharded(job.recipe.train)
    samples = SampleAnswers(job) if run.world.is_first or is_shared else None
    if is_shared:
        shard_base(job.base.model)
    report = _build_report(trainable, _run_training(trainable, run), run.world)
    answered = samples.after(report.thresholds) if samples is not None else None

    def save() -> str | None:
        files = build_result_files(report, outcomes=answered, num_labels=len(job.labels))
        return trainable.save(report, files, replace=replace).digest

    return dataclasses.replace(report, digest=run.world.ask_first(save))


@dataclass(frozen=True, kw_only=True)
class _TrainingOutcome:
    """The outcome of a training that ended normally.

    Attributes:
        trainer: with the state and the counts of the training.
        seconds: wall time without evaluations.
        peak_bytes: peak memory.
        before: metrics on the validation rows before training; None without any.
        after: metrics on the validation rows of the weights that are kept; None without any.
        thresholds: of labels of which any number may apply; see `TrainReport`.
    """

    trainer: ResumableLoop
    seconds: float
    peak_bytes: int
    before: Evaluation | None
    after: Evaluation | None
    thresholds: tuple[float, ...] = ()


def _run_training(trainable: TrainableJob, run: StartedRun) -> _TrainingOutcome:
    """Train the parameters that require a gradient. Other changes that the Trainer makes to the model are undone."""
    job = trainable.job
    with set_up_training(job.base, compiled=job.recipe.compile) as scratch:
        trainer = _build_trainer(trainable, scratch, run)
        trainer.before = trainer.measure_validation()
        if run.world.is_first:
            trainer.add_callback(_build_run_log(job, run, trainer.before))
        logger.info("%s", describe_cpu_threads(torch.get_num_threads()))
        clock = Clock(job.base.device)
        try:
            with run.stop, run.join(trainer):
                trainer.train_from(run.checkpoint)
        finally:
            trainer.close()
        seconds = trainer.seconds_before + clock.seconds - trainer.evaluating_seconds
        thresholds = _choose_thresholds(job, trainer)
        known = None if thresholds else dict(trainer.evaluations).get(trainer.kept)
        after = known or trainer.measure_validation(thresholds)
    return _TrainingOutcome(
        trainer=trainer,
        seconds=seconds,
        peak_bytes=clock.peak_bytes,
        before=trainer.before,
        after=after,
        thresholds=thresholds,
    )


def _build_trainer(trainable: TrainableJob, scratch: str, run: StartedRun) -> ResumableLoop:
    from transformers import EarlyStoppingCallback

    from lora_kit.training.job.loops import build_job_arguments, build_loop
    from lora_kit.training.loop.run_state import RunContext
    from lora_kit.training.loop.unused_parameters import UnusedParameterCallback

    job = trainable.job
    train_section = job.recipe.train
    patience = train_section.get("early_stopping_patience")
    early_stopping = [EarlyStoppingCallback(patience)] if patience else []
    with _translate_trainer_errors():
        args = build_job_arguments(job, scratch, run.world)
        args.disable_tqdm = args.disable_tqdm or not run.shows_bar
        trainer = build_loop(
            trainable,
            args,
            callbacks=[UnusedParameterCallback(), *early_stopping, *run.callbacks],
            run=RunContext(
                folder=run.folder,
                world=run.world,
                identity=job.identity,
                setting=job.environment,
                stop=run.stop,
                encode_adapter=trainable.encode_adapter,
                trainable=trainable.count,
                parameters=trainable.parameters,
            ),
        )
    _set_tensorboard_folder(trainer, f"{run.folder.out}{TENSORBOARD_SUFFIX}")
    return trainer


def _build_run_log(job: Job, run: StartedRun, before: Evaluation | None) -> RunLog:
    recipe = job.recipe
    objective = "" if recipe.objective == SFT else f", {recipe.objective}"
    progress = RunProgress(
        title=f"{recipe.task}{objective}, {recipe.method} on {recipe.base}",
        run=hash_json(job.identity),
        folder=os.getcwd(),
        processes=run.world.size,
        processes_by_machine=run.world.processes_by_machine,
    )
    return RunLog(run.folder.folder, recipe=recipe.to_yaml(), progress=progress, before=before)


@contextlib.contextmanager
def _translate_trainer_errors() -> Iterator[None]:
    """Raise as RecipeError what only transformers can check: values that conflict, or need a package or a device."""
    try:
        yield
    except (torch.OutOfMemoryError, LoraKitError):
        raise
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise RecipeError(f"train: {' '.join(str(error).split())}") from error


def _set_tensorboard_folder(trainer: ResumableLoop, folder: str) -> None:
    """Have TensorBoard write beside the output: its default is in the temporary folder of the training."""
    from transformers.integrations import TensorBoardCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = folder


def _choose_thresholds(job: Job, trainer: ResumableLoop) -> tuple[float, ...]:
    """Return thresholds for the validation rows where any number of labels apply; empty without any."""
    if job.recipe.problem != MULTI_LABEL or job.validation is None:
        return ()
    size, autocast = trainer.args.per_device_eval_batch_size, trainer.autocast_dtype
    forward = run_forward(
        job.base.model, job.validation, job.collator, batch_size=size, autocast=autocast, peers=trainer.peers
    )
    assert forward.scores is not None
    thresholds = choose_thresholds(forward.scores, job.validation.labels.view(len(job.validation), -1))
    listed = [f"{label} {threshold:.3g}" for label, threshold in zip(job.labels, thresholds, strict=True)]
    logger.info("thresholds with the best F1 on the validation rows: %s", format_list(listed))
    return thresholds


def _build_report(trainable: TrainableJob, outcome: _TrainingOutcome, world: World) -> TrainReport:
    job, trainer = trainable.job, outcome.trainer
    log = trainer.state.log_history
    report = TrainReport(
        out=Path(job.recipe.out),
        method=job.recipe.method,
        task=job.recipe.task,
        steps=trainer.state.global_step,
        max_steps=trainer.state.max_steps,
        kept=trainer.kept,
        resumed=trainer.resumed,
        seconds=max(world.gather(outcome.seconds)),
        tokens=trainer.tokens,
        peak_bytes=max(world.gather(outcome.peak_bytes)),
        micro_batch=min(world.gather(trainer.micro_batch)),
        processes=world.size,
        frozen=trainer.frozen,
        trainable=trainable.count,
        parameters=trainable.parameters,
        train_loss=[entry["loss"] for entry in log if "loss" in entry][-1],
        before=outcome.before,
        after=outcome.after,
        thresholds=outcome.thresholds,
        text_pairs=has_text_pairs(job.rows),
        history=(),
        digest=None,
        recipe=job.recipe,
    )
    return dataclasses.replace(report, history=tuple(build_history(report, log)))
