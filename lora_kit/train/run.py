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

from lora_kit.bank import AdapterBank, attach
from lora_kit.errors import RecipeError
from lora_kit.files import staged
from lora_kit.models import Base, quiet
from lora_kit.train.artifacts import beside
from lora_kit.train.contexts import borrowed, compiled_layers, repeatable
from lora_kit.train.evaluate import Evaluation, evaluate
from lora_kit.train.prepare import Job, check_out, is_model_of_ours, prepared, read
from lora_kit.train.recipe import Recipe, load_recipe, training_fields
from lora_kit.train.report import Clock, TrainReport, history, metrics

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments

    from lora_kit.train.trainer import Trainer

logger = logging.getLogger(__name__)

_RENAMED: Final = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Older names of TrainingArguments that recipes may use, and what newer versions of transformers call them."""


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    base: Base | None = None,
    overrides: Mapping[str, Any] | None = None,
    replace: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainReport:
    """Train what a recipe says and write it to the recipe's `out`, all or nothing.

    The same recipe with the same seed gives the same adapter bytes on the same machine.

    Args:
        recipe: a YAML or TOML file, what stands in one, or a Recipe.
        base: a base that is loaded already; it is the same afterwards, bit for bit. None: the recipe's is loaded.
        overrides: values by dotted key (`lora.r`, `train.learning_rate`), which win.
        replace: an earlier result at `out` may be replaced.
        callbacks: further callbacks of transformers.

    Raises:
        RecipeError, DataError, BaseModelError, TargetError: what was given is wrong; nothing has been trained.
        StorageError: `out` exists, or cannot be written.
        VerificationError: the loss stopped being a number. Nothing is written.
    """
    wanted = load_recipe(recipe, overrides=overrides)
    check_out(wanted, replace=replace)
    rows = read(wanted)
    with quiet():
        job = prepared(wanted, rows, base)
        if wanted.method == "full":
            return _train_full(job, callbacks, replace=replace)
        return _train_adapter(job, callbacks, replace=replace)


def _train_adapter(job: Job, callbacks: Sequence[TrainerCallback], *, replace: bool) -> TrainReport:
    from transformers import set_seed

    recipe, model = job.recipe, job.base.model
    set_seed(recipe.seed)
    bank = attach(model, recipe.lora, name=recipe.name)
    try:
        trainable = bank.coverage(recipe.name).parameters
        parameters = model.num_parameters()
        logger.info("%s", bank.coverage(recipe.name))
        report = _report(job, _trained(job, model, callbacks), trainable, parameters)
        return _save_adapter(job, bank, report, replace=replace)
    finally:
        bank.detach()


def _save_adapter(job: Job, bank: AdapterBank, report: TrainReport, *, replace: bool) -> TrainReport:
    recipe = job.recipe
    record: dict[str, Any] = {"recipe": recipe.to_dict(), "seed": recipe.seed, "metrics": metrics(report)}
    if job.labels:
        record["labels"] = list(job.labels)
    files = beside(recipe, report.history)
    adapter = bank.save(recipe.name, report.out, record=record, files=files, replace=replace)
    return dataclasses.replace(report, digest=adapter.digest)


def _train_full(job: Job, callbacks: Sequence[TrainerCallback], *, replace: bool) -> TrainReport:
    model, recipe = job.base.model, job.recipe
    model.requires_grad_(True)
    count = model.num_parameters()
    report = _report(job, _trained(job, model, callbacks), count, count)
    with staged(report.out, replace=replace, owned=is_model_of_ours) as folder:
        model.save_pretrained(folder)
        job.base.tokenizer.save_pretrained(folder)
        for name, data in beside(recipe, report.history).items():
            (folder / name).write_bytes(data)
    return report


# The training


@dataclass(frozen=True, kw_only=True)
class _Done:
    """A training that went through."""

    trainer: Trainer
    seconds: float
    peak_bytes: int
    before: Evaluation | None
    after: Evaluation | None


def _trained(job: Job, model: Any, callbacks: Sequence[TrainerCallback]) -> _Done:
    """Train a model's trainable parameters. What the Trainer changes besides them is put back."""
    device = job.base.device
    with contextlib.ExitStack() as stack:
        # The Trainer wants a folder, though nothing is written there as long as it saves no checkpoints.
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="lora_kit-"))
        stack.enter_context(repeatable(device))
        stack.enter_context(borrowed(model))
        if job.recipe.compile:
            stack.enter_context(compiled_layers(model))
        trainer = _trainer(job, model, scratch, callbacks)
        before = _evaluated(job, trainer)
        clock = Clock(device)
        try:
            trainer.train()
        finally:
            trainer.close()
        seconds = clock.seconds - trainer.evaluating_seconds
        last = trainer.evaluations[-1] if trainer.evaluations else (-1, None)
        after = last[1] if last[0] == trainer.state.global_step else _evaluated(job, trainer)
    return _Done(trainer=trainer, seconds=seconds, peak_bytes=clock.peak_bytes, before=before, after=after)


def _trainer(job: Job, model: Any, scratch: str, callbacks: Sequence[TrainerCallback]) -> Trainer:
    from lora_kit.train.trainer import Trainer

    data: dict[str, Any] = {"train": job.train, "validation": job.validation, "collator": job.collator}
    try:
        return Trainer(model, _arguments(job, scratch), callbacks=list(callbacks), **data)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        # What only transformers can tell: values that do not go together, or that need a package or a device.
        raise RecipeError(f"train: {' '.join(str(error).split())}") from error


def _arguments(job: Job, scratch: str) -> TrainingArguments:
    from transformers import TrainingArguments

    # Left open, transformers would hide the bar because its own log is quiet here.
    values = {"disable_tqdm": False, **job.recipe.train}
    for older, newer in _RENAMED.items():
        if older in values and newer in training_fields():
            values[newer] = values.pop(older)
    args = TrainingArguments(
        output_dir=scratch,
        use_cpu=job.base.device.type == "cpu",
        save_strategy="no",
        remove_unused_columns=False,
        label_names=["labels"],
        logging_nan_inf_filter=False,
        **values,
    )
    # More devices than one would be wrapped in DataParallel, which copies the model in every step.
    args._n_gpu = min(args.n_gpu, 1)
    return args


def _evaluated(job: Job, trainer: Trainer) -> Evaluation | None:
    if job.validation is None:
        return None
    size = trainer.args.per_device_eval_batch_size
    return evaluate(trainer.model, job.validation, job.collator, batch_size=size, autocast=trainer.autocast_dtype)


def _report(job: Job, done: _Done, trainable: int, parameters: int) -> TrainReport:
    state = done.trainer.state
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    report = TrainReport(
        out=Path(job.recipe.out),
        method=job.recipe.method,
        task=job.recipe.task,
        steps=state.global_step,
        seconds=done.seconds,
        tokens=done.trainer.tokens,
        peak_bytes=done.peak_bytes,
        trainable=trainable,
        parameters=parameters,
        train_loss=losses[-1],
        before=done.before,
        after=done.after,
        history=(),
        digest=None,
        recipe=job.recipe,
    )
    return dataclasses.replace(report, history=tuple(history(report, state.log_history)))
