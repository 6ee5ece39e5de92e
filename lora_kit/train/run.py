"""Training: a recipe in, an adapter folder (or a model folder) out, and the base as it was."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from lora_kit.adapter import is_adapter_folder
from lora_kit.bank import AdapterBank, attach
from lora_kit.config import LoraConfig
from lora_kit.data import Collator, Encoded, Rows, encode, label_names, read_rows
from lora_kit.errors import DataError, RecipeError, StorageError, listed
from lora_kit.files import check_output, printable, staged
from lora_kit.models import Base, head_modules, load_base, quiet
from lora_kit.train.artifacts import RECIPE, beside
from lora_kit.train.evaluate import Evaluation, evaluate
from lora_kit.train.recipe import HEAD, Recipe, load_recipe, training_fields

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments

    from lora_kit.train.trainer import Trainer

logger = logging.getLogger(__name__)

LONGEST: Final = 2048
"""Tokens of a sample where neither recipe nor base sets a lower limit."""
_TASK_TYPES: Final = {"causal-lm": "CAUSAL_LM", "classify": "SEQ_CLS"}
_RENAMED: Final = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Older names of TrainingArguments that recipes may use, and what newer versions of transformers call them."""
_FORMATS: Final = {"causal-lm": ("completion", "text"), "classify": ("label",)}


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a training did.

    Attributes:
        out: the folder of the result.
        method, task: of the recipe.
        steps: optimiser steps.
        seconds: wall time of the training, without loading and evaluation.
        tokens: tokens trained on, padding left out, each time they were seen.
        peak_bytes: the most memory in use: of the CUDA device, or of the whole process where there is none.
        trainable, parameters: elements trained, and of the model with the adapter.
        train_loss: mean training loss over the last logging interval, in nats per label.
        before, after: metrics on the validation file; None where the recipe names none.
        history: the log, entry by entry, as in metrics.jsonl.
        digest: identity of the adapter; None for `full`.
        recipe: as it was resolved.
    """

    out: Path
    method: str
    task: str
    steps: int
    seconds: float
    tokens: int
    peak_bytes: int
    trainable: int
    parameters: int
    train_loss: float
    before: Evaluation | None
    after: Evaluation | None
    history: tuple[Mapping[str, Any], ...]
    digest: str | None
    recipe: Recipe

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Everything a training needs, checked."""

    recipe: Recipe
    base: Base
    train: Encoded
    validation: Encoded | None
    labels: tuple[str, ...]

    @property
    def collator(self) -> Collator:
        return Collator(self.base.tokenizer.pad_token_id)


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
    _check_out(wanted, replace=replace)
    rows = _read(wanted)
    with quiet():
        job = _prepared(wanted, rows, base)
        if wanted.method == "full":
            return _train_full(job, callbacks, replace=replace)
        return _train_adapter(job, callbacks, replace=replace)


def _train_adapter(job: _Job, callbacks: Sequence[TrainerCallback], *, replace: bool) -> TrainReport:
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


def _save_adapter(job: _Job, bank: AdapterBank, report: TrainReport, *, replace: bool) -> TrainReport:
    recipe = job.recipe
    record: dict[str, Any] = {"recipe": recipe.to_dict(), "seed": recipe.seed, "metrics": _metrics(report)}
    if job.labels:
        record["labels"] = list(job.labels)
    files = beside(recipe, report.history)
    adapter = bank.save(recipe.name, report.out, record=record, files=files, replace=replace)
    return dataclasses.replace(report, digest=adapter.digest)


def _train_full(job: _Job, callbacks: Sequence[TrainerCallback], *, replace: bool) -> TrainReport:
    model, recipe = job.base.model, job.recipe
    model.requires_grad_(True)
    count = model.num_parameters()
    report = _report(job, _trained(job, model, callbacks), count, count)
    with staged(report.out, replace=replace, owned=_is_ours) as folder:
        model.save_pretrained(folder)
        job.base.tokenizer.save_pretrained(folder)
        for name, data in beside(recipe, report.history).items():
            (folder / name).write_bytes(data)
    return report


# What is given


def _check_out(recipe: Recipe, *, replace: bool) -> None:
    out, base = Path(recipe.out), Path(recipe.base).expanduser()
    _check_writable(out)
    check_output(out, replace=replace, owned=_is_ours if recipe.method == "full" else is_adapter_folder)
    if base.is_dir() and (out.resolve().is_relative_to(base.resolve()) or base.resolve().is_relative_to(out.resolve())):
        raise StorageError(f"{printable(out)} lies in the base's folder, or holds it", hint="choose another output")
    if not recipe.name:
        raise RecipeError(f"out {recipe.out!r} has no name", hint="its last part names the adapter")


def _check_writable(out: Path) -> None:
    """Refuse a place that cannot be written to before hours of training, not after."""
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise StorageError(f"{printable(out)} lies in {printable(above)}, which is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise StorageError(f"{printable(out)} cannot be written: {printable(above)} may not be written to")


def _is_ours(folder: Path) -> bool:
    """Whether a folder is a trained model of ours, which may be replaced."""
    return (folder / RECIPE).is_file() and (folder / "config.json").is_file()


def _read(recipe: Recipe) -> tuple[Rows, Rows | None]:
    """The rows of both files, of a format that the task can use."""
    files = [recipe.data.train, recipe.data.validation]
    rows = [read_rows(file) if file else None for file in files]
    for found in rows:
        if found is not None and found.format not in _FORMATS[recipe.task]:
            other = next(task for task, formats in _FORMATS.items() if found.format in formats)
            raise DataError(
                f"{found.path} has rows of the format {found.format}; task {recipe.task} takes "
                f"{listed(_FORMATS[recipe.task])}",
                hint=f"task: {other} uses these rows",
            )
    first, second = rows
    assert first is not None
    if second is not None and second.format != first.format:
        kinds = f"{first.path} has rows of the format {first.format}, {second.path} of the format {second.format}"
        raise DataError(kinds, hint="both files of a recipe have one format")
    return first, second


def _prepared(recipe: Recipe, rows: tuple[Rows, Rows | None], given: Base | None) -> _Job:
    """The base and the data, ready; the recipe with everything that was left open filled in."""
    names = label_names(rows[0]) if recipe.task == "classify" else ()
    label2id = {name: number for number, name in enumerate(names)}
    if given is not None and set(names) == set(given.model.config.label2id):
        # A head that knows these labels already keeps them in its own order.
        label2id = dict(given.model.config.label2id)
        names = tuple(sorted(names, key=label2id.__getitem__))
    base = _loaded(recipe, label2id) if given is None else _borrowed_base(recipe, given, label2id)
    recipe = _resolved(recipe, rows[0], base)
    settings: dict[str, Any] = {"max_length": recipe.data.max_length, "separator": recipe.data.separator}
    train_set, validation = (
        encode(found, base.tokenizer, label2id=label2id, **settings) if found is not None else None for found in rows
    )
    assert train_set is not None
    logger.info("%s: %d samples, %d labels", rows[0].path, len(train_set), train_set.num_labels)
    if validation is None:
        logger.info("no evaluation: the recipe names no data.validation")
    return _Job(recipe=recipe, base=base, train=train_set, validation=validation, labels=names)


def _loaded(recipe: Recipe, label2id: Mapping[str, int]) -> Base:
    # Small steps are lost in 16 bits: every weight is trained in fp32 unless the recipe asks for something else.
    dtype = "fp32" if recipe.method == "full" and recipe.dtype == "auto" else recipe.dtype
    return load_base(recipe.base, task=recipe.task, label2id=label2id or None, dtype=dtype, quantize=recipe.quantize)


def _borrowed_base(recipe: Recipe, base: Base, label2id: Mapping[str, int]) -> Base:
    """A base that someone else loaded, checked against the recipe; a copy of it where its weights will change."""
    if (base.name, base.task) != (recipe.base, recipe.task):
        given = f"the base given is {base.name} ({base.task})"
        raise RecipeError(f"the recipe is for {recipe.base} ({recipe.task}), {given}")
    if recipe.dtype != "auto" or recipe.quantize:
        raise RecipeError("dtype and quantize do nothing for a base that is loaded already", hint="load it so")
    if label2id and base.model.config.num_labels != len(label2id):
        raise RecipeError(f"the base given has {base.model.config.num_labels} labels, the data {len(label2id)}")
    if recipe.method != "full":
        return base
    if getattr(base.model, "is_quantized", False):
        raise RecipeError("method full cannot train the weights of a quantised base", hint="use method lora")
    model = copy.deepcopy(base.model).float()
    if label2id:
        model.config.label2id, model.config.id2label = dict(label2id), {v: k for k, v in label2id.items()}
    return dataclasses.replace(base, model=model)


def _resolved(recipe: Recipe, rows: Rows, base: Base) -> Recipe:
    length = recipe.data.max_length or min(base.max_length, LONGEST)
    if length > base.max_length:
        raise RecipeError(f"data.max_length is {length}; {base.name} sees {base.max_length} tokens at once")
    # A text of its own has no prompt, and nothing is to be put after one in generation.
    separator = recipe.data.separator if rows.format == "completion" else ""
    data = dataclasses.replace(recipe.data, max_length=length, separator=separator)
    return recipe.replace(data=data, lora=_config(recipe, base))


def _config(recipe: Recipe, base: Base) -> LoraConfig:
    """The adapter's config with its head by name, and with labels for other tools."""
    if recipe.method == "full":
        return recipe.lora
    saved = [name for name in recipe.lora.modules_to_save if name != HEAD]
    # A head of a new task is random at first: an adapter that did not bring it would be of no use.
    if recipe.task == "classify" or HEAD in recipe.lora.modules_to_save:
        head = [name for name in head_modules(base.model, recipe.task) if name not in saved]
        if head and recipe.method == "lora":
            logger.info("the head is trained and saved whole: %s", listed(head))
        saved += head
    return dataclasses.replace(
        recipe.lora,
        modules_to_save=tuple(saved),
        base_model_name_or_path=recipe.lora.base_model_name_or_path or base.name,
        task_type=_TASK_TYPES[recipe.task],
    )


# The training


@dataclass(frozen=True, kw_only=True)
class _Done:
    """A training that went through."""

    trainer: Trainer
    seconds: float
    peak_bytes: int
    before: Evaluation | None
    after: Evaluation | None


def _trained(job: _Job, model: Any, callbacks: Sequence[TrainerCallback]) -> _Done:
    """Train a model's trainable parameters. What the Trainer changes besides them is put back."""
    from lora_kit.train.trainer import Clock, borrowed, repeatable

    # The Trainer wants a folder, though nothing is written there as long as it saves no checkpoints.
    with tempfile.TemporaryDirectory(prefix="lora_kit-") as scratch, repeatable(job.base.device), borrowed(model):
        trainer = _trainer(job, model, scratch, callbacks)
        before = _evaluated(job, trainer)
        clock = Clock(job.base.device)
        try:
            trainer.train()
        finally:
            trainer.close()
        seconds = clock.seconds - trainer.evaluating_seconds
        last = trainer.evaluations[-1] if trainer.evaluations else (-1, None)
        after = last[1] if last[0] == trainer.state.global_step else _evaluated(job, trainer)
    return _Done(trainer=trainer, seconds=seconds, peak_bytes=clock.peak_bytes, before=before, after=after)


def _trainer(job: _Job, model: Any, scratch: str, callbacks: Sequence[TrainerCallback]) -> Trainer:
    from lora_kit.train.trainer import Trainer

    data: dict[str, Any] = {"train": job.train, "validation": job.validation, "collator": job.collator}
    try:
        return Trainer(model, _arguments(job, scratch), callbacks=list(callbacks), **data)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        # What only transformers can tell: values that do not go together, or that need a package or a device.
        raise RecipeError(f"train: {' '.join(str(error).split())}") from error


def _arguments(job: _Job, scratch: str) -> TrainingArguments:
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


def _evaluated(job: _Job, trainer: Trainer) -> Evaluation | None:
    if job.validation is None:
        return None
    size = trainer.args.per_device_eval_batch_size
    return evaluate(trainer.model, job.validation, job.collator, batch_size=size, autocast=trainer.autocast_dtype)


# What is told


def _report(job: _Job, done: _Done, trainable: int, parameters: int) -> TrainReport:
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
    return dataclasses.replace(report, history=tuple(_history(report, state.log_history)))


def _history(report: TrainReport, log: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The log of a training: metrics before, what the Trainer logged, metrics after, and a line that sums it up."""
    entries = [entry for entry in log if "train_runtime" not in entry]
    evaluated = {entry["step"] for entry in entries if "eval_loss" in entry}
    if report.before and 0 not in evaluated:
        yield {"step": 0, **_prefixed(report.before)}
    for entry in entries:
        yield {"step": entry["step"], **{key: value for key, value in entry.items() if key != "step"}}
    if report.after and report.steps not in evaluated:
        yield {"step": report.steps, **_prefixed(report.after)}
    speed = round(report.tokens_per_second, 1)
    total = {"seconds": round(report.seconds, 3), "tokens": report.tokens, "tokens_per_second": speed}
    yield {"step": report.steps, "train_loss": report.train_loss, **total, "peak_bytes": report.peak_bytes}


def _prefixed(evaluation: Evaluation) -> dict[str, float]:
    return {f"eval_{key}": value for key, value in evaluation.metrics().items()}


def _metrics(report: TrainReport) -> dict[str, Any]:
    """What goes into the adapter's record: nothing that changes from run to run."""
    found: dict[str, Any] = {"steps": report.steps, "tokens": report.tokens, "train_loss": report.train_loss}
    if report.before and report.after:
        found |= report.after.metrics()
        found |= {f"{key}_before": value for key, value in report.before.metrics().items()}
    return found
