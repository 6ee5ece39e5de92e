"""Training: a recipe in, an adapter folder (or a model folder) out, and the base as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from lora_kit.errors import LoraKitError, RecipeError
from lora_kit.evaluation.measure import Evaluation, measure
from lora_kit.io.atomic_write import lock_output
from lora_kit.models.loading import Base
from lora_kit.models.silence import silence_libraries
from lora_kit.torch_utils import Clock
from lora_kit.training.job.job import Job, check_output_available, check_output_writable, prepare_job, read_recipe_rows
from lora_kit.training.job.methods import TrainableJob, make_job_trainable
from lora_kit.training.loop.checkpoints import Checkpoint, RunFolder
from lora_kit.training.loop.contexts import compile_layers, preserve_model_settings, use_deterministic_kernels
from lora_kit.training.loop.learning_rates import LearningRates
from lora_kit.training.loop.oom_retry import translate_out_of_memory
from lora_kit.training.loop.signals import StopRequest
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.recipe.recipe import Recipe
from lora_kit.training.recipe.training_arguments import build_training_arguments, check_reporting
from lora_kit.training.report.artifacts import build_result_files
from lora_kit.training.report.samples import SampleAnswers
from lora_kit.training.results import TrainReport, build_history

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from lora_kit.training.loop.resumable import ResumableTrainer

logger = logging.getLogger(__name__)

TENSORBOARD_SUFFIX: Final = ".tensorboard"
"""Where TensorBoard looks for a run: the output's path and this, unless TENSORBOARD_LOGGING_DIR says otherwise."""


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    base: Base | None = None,
    overrides: Mapping[str, Any] | None = None,
    replace: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainReport:
    """Train what a recipe says and write it to the recipe's `out`, all or nothing.

    The same recipe with the same seed gives the same adapter bytes on the same machine. Checkpoints are kept in a
    folder beside `out` until the result is saved: a training that was stopped goes on from there when it is started
    again, and ends with the same bytes.

    Args:
        recipe: a YAML or TOML file, what stands in one, or a Recipe.
        base: a base that is loaded already; it is the same afterwards, bit for bit. None: the recipe's is loaded.
        overrides: values by dotted key (`lora.r`, `train.learning_rate`), which win.
        replace: an earlier result at `out` may be replaced, and so may checkpoints of another recipe.
        callbacks: further callbacks of transformers.

    Raises:
        RecipeError, DataError, BaseModelError, TargetError: what was given is wrong, or differs from what the
            checkpoints are of; nothing has been trained.
        StorageError: `out` exists, cannot be written, or another process trains it; or memory does not suffice.
        VerificationError: the loss stopped being a number. Nothing is written.
    """
    wanted = load_recipe(recipe, overrides=overrides)
    check_output_writable(wanted)
    check_reporting(wanted.train)
    run = RunFolder(wanted.out)
    with lock_output(run.folder), silence_libraries():
        run.remove_if_done()
        check_output_available(wanted, replace=replace)
        job = prepare_job(wanted, read_recipe_rows(wanted), base)
        found = run.find_resumable(job.identity, job.setting, replace=replace)
        start = _Start(run=run, checkpoint=found, replace=replace)
        try:
            with translate_out_of_memory(), make_job_trainable(job) as ready:
                report = _train_and_save(ready, start, callbacks)
        except BaseException:
            run.log_resume_point()
            raise
        run.remove()
    return report


@dataclass(frozen=True, kw_only=True)
class _Start:
    """Where a training begins, and what it may replace."""

    run: RunFolder
    checkpoint: Checkpoint | None
    replace: bool


def _train_and_save(ready: TrainableJob, start: _Start, callbacks: Sequence[TrainerCallback]) -> TrainReport:
    """Train, and save the result."""
    samples = SampleAnswers(ready.job)
    report = _build_report(ready, _run_training(ready.job, start, callbacks))
    files = build_result_files(report, samples=samples.after(), labels=len(ready.job.labels))
    return ready.save(report, files, replace=start.replace)


# The training


@dataclass(frozen=True, kw_only=True)
class _TrainingOutcome:
    """A training that went through."""

    trainer: ResumableTrainer
    seconds: float
    peak_bytes: int
    before: Evaluation | None
    after: Evaluation | None


def _run_training(job: Job, start: _Start, callbacks: Sequence[TrainerCallback]) -> _TrainingOutcome:
    """Train what requires a gradient. What the Trainer changes on the model besides is put back."""
    model, device = job.base.model, job.base.device
    with contextlib.ExitStack() as stack:
        # The Trainer wants a folder of its own, though nothing is written there: checkpoints go to the run's.
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="lora_kit-"))
        stack.enter_context(use_deterministic_kernels(device))
        stack.enter_context(preserve_model_settings(model))
        if job.recipe.compile:
            stack.enter_context(compile_layers(model))
        stop = StopRequest()
        trainer = _build_trainer(job, scratch, callbacks, run=start.run, stop=stop)
        before = _evaluate_validation(job, trainer)
        clock = Clock(device)
        try:
            with stop:
                trainer.train_from(start.checkpoint)
        finally:
            trainer.close()
        seconds = trainer.seconds_before + clock.seconds - trainer.evaluating_seconds
        after = dict(trainer.evaluations).get(trainer.kept) or _evaluate_validation(job, trainer)
    return _TrainingOutcome(trainer=trainer, seconds=seconds, peak_bytes=clock.peak_bytes, before=before, after=after)


def _build_trainer(
    job: Job, scratch: str, callbacks: Sequence[TrainerCallback], *, run: RunFolder, stop: StopRequest
) -> ResumableTrainer:
    from transformers import EarlyStoppingCallback
    from transformers.integrations import TensorBoardCallback

    from lora_kit.training.loop.resumable import ResumableTrainer
    from lora_kit.training.loop.unused_parameters import UnusedParameterCallback

    patience = job.recipe.train.get("early_stopping_patience")
    stopping = [EarlyStoppingCallback(patience)] if patience else []
    data: dict[str, Any] = {"train": job.train, "validation": job.validation, "collator": job.collator}
    data["rates"], data["measured"] = LearningRates.of(job.recipe.train, job.recipe.task), job.measured
    whose: dict[str, Any] = {"run": run, "identity": job.identity, "setting": job.setting, "stop": stop}
    try:
        args = build_training_arguments(job.recipe.train, device=job.base.device, folder=scratch, name=job.recipe.name)
        trainer = ResumableTrainer(
            job.base.model, args, callbacks=[UnusedParameterCallback(), *stopping, *callbacks], **data, **whose
        )
    except (torch.OutOfMemoryError, LoraKitError):
        raise
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        # What only transformers can tell: values that do not go together, or that need a package or a device.
        raise RecipeError(f"train: {' '.join(str(error).split())}") from error
    for each in trainer.callback_handler.callbacks:
        # Transformers would have TensorBoard's files in its own folder, which goes with the training.
        if isinstance(each, TensorBoardCallback) and each.logging_dir is None:
            each.logging_dir = f"{run.out}{TENSORBOARD_SUFFIX}"
    return trainer


def _evaluate_validation(job: Job, trainer: ResumableTrainer) -> Evaluation | None:
    if job.validation is None:
        return None
    size, autocast = trainer.args.per_device_eval_batch_size, trainer.autocast_dtype
    return measure(trainer.model, job.validation, job.collator, batch_size=size, autocast=autocast, **job.measured)


def _build_report(ready: TrainableJob, done: _TrainingOutcome) -> TrainReport:
    job, state = ready.job, done.trainer.state
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    report = TrainReport(
        out=Path(job.recipe.out),
        method=job.recipe.method,
        task=job.recipe.task,
        steps=state.global_step,
        kept=done.trainer.kept,
        resumed=done.trainer.resumed,
        seconds=done.seconds,
        tokens=done.trainer.tokens,
        peak_bytes=done.peak_bytes,
        micro_batch=done.trainer.micro_batch,
        trainable=ready.count,
        parameters=ready.parameters,
        train_loss=losses[-1],
        before=done.before,
        after=done.after,
        history=(),
        digest=None,
        recipe=job.recipe,
    )
    return dataclasses.replace(report, history=tuple(build_history(report, state.log_history)))
