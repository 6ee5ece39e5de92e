"""What a training would do, before it does it: counted, estimated, and two steps of it measured. Nothing is written."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_kit.bank import attach
from lora_kit.data import ChatTemplate, Packed, Rows
from lora_kit.data.encode import measure
from lora_kit.models import Base, quiet
from lora_kit.train.arguments import check_reporting, training_arguments
from lora_kit.train.checkpoints import RunFolder
from lora_kit.train.contexts import borrowed, compiled_layers, repeatable
from lora_kit.train.memory import explained
from lora_kit.train.prepare import Job, check_out, check_place, prepared, read
from lora_kit.train.reading import load_recipe
from lora_kit.train.recipe import Recipe

if TYPE_CHECKING:
    from lora_kit.train.footprint import Footprint


@dataclass(frozen=True)
class Kind:
    """Modules of one name: how many are trained, with how many parameters."""

    name: str
    modules: int
    parameters: int


@dataclass(frozen=True)
class Data:
    """Rows of the training file as samples.

    Attributes:
        rows: of the file. samples: that are trained on in an epoch.
        tokens: of all samples. labels: on which a loss is taken.
        cut: rows that lose tokens, or become several samples, to fit `longest`.
        longest: tokens of a sample at the most.
    """

    rows: int
    samples: int
    tokens: int
    labels: int
    cut: int
    longest: int


@dataclass(frozen=True)
class Steps:
    """How the training goes over the data.

    Attributes:
        steps: optimiser steps. warmup: of them with a rising learning rate. per_epoch: in one pass over the data.
        batch: samples of a step. micro_batch: samples at once. accumulation: micro-batches of a step.
    """

    steps: int
    warmup: int
    per_epoch: int
    batch: int
    micro_batch: int
    accumulation: int


@dataclass(frozen=True)
class Measured:
    """Two steps that were done to see, and undone: one of the longest samples there are, then one of any.

    Attributes:
        seconds: of the second step. tokens: in it.
        peak_bytes: the most memory in both: of the CUDA device, or of the whole process where there is none.
        micro_batch: rows at once: those of the recipe, or fewer where memory ran out.
    """

    seconds: float
    tokens: int
    peak_bytes: int
    micro_batch: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training would do.

    Attributes:
        out: where the result would be written. goes_on_from: step of the checkpoint it would begin at; 0 for anew.
        trainable, parameters: elements trained, and of the model with the adapter. kinds: where the trained ones are.
        memory: estimated, see `lora_kit.train.footprint`.
        measured: in two steps on this machine.
        seconds: estimated wall time of all steps, evaluations left out: all tokens at the speed of the measured step.
        recipe: as it was resolved.
    """

    out: Path
    goes_on_from: int
    trainable: int
    parameters: int
    kinds: tuple[Kind, ...]
    data: Data
    steps: Steps
    memory: Footprint
    measured: Measured
    seconds: float
    recipe: Recipe

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        fields = {name: value for name, value in vars(self).items() if name not in ("out", "recipe", "kinds")}
        plain = {name: asdict(value) if hasattr(value, "__dataclass_fields__") else value
                 for name, value in fields.items()}  # fmt: skip
        plain["memory"]["total"] = self.memory.total
        kinds = [asdict(kind) for kind in self.kinds]
        return {"out": str(self.out), **plain, "kinds": kinds, "recipe": self.recipe.to_dict()}


def plan(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    base: Base | None = None,
    overrides: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Plan:
    """Say what `train` would do with the same arguments; nothing is trained and nothing is written.

    Two steps are done to measure them, on an adapter that is thrown away; a base that is given is the same afterwards.

    Raises:
        LoraKitError: whatever `train` would refuse before its first step.
    """
    wanted = load_recipe(recipe, overrides=overrides)
    check_place(wanted)
    check_reporting(wanted.train)
    with quiet():
        check_out(wanted, replace=replace)
        rows = read(wanted)
        job = prepared(wanted, rows, base)
        found = RunFolder(wanted.out).standing(job.identity, replace=replace)
        with explained(), _trainable(job) as kinds:
            return _planned(job, rows[0], kinds, found.step if found else 0)


@contextlib.contextmanager
def _trainable(job: Job) -> Iterator[tuple[Kind, ...]]:
    """Within, the model is as it would be trained; gives what of it would be."""
    from transformers import set_seed

    model = job.base.model
    with torch.random.fork_rng(devices=[job.base.device] if job.base.device.type == "cuda" else []):
        set_seed(job.recipe.seed)
        if job.recipe.method == "full":
            model.requires_grad_(True)
            yield (Kind("every weight", 1, model.num_parameters()),)
            return
        bank = attach(model, job.recipe.lora, name=job.recipe.name)
        try:
            coverage = bank.coverage(job.recipe.name)
            found: dict[str, list[int]] = {}
            for target in coverage.targets:
                found.setdefault(target.path.rpartition(".")[2], []).append(target.parameters)
            kinds = [Kind(name, len(each), sum(each)) for name, each in found.items()]
            if coverage.saved:
                kinds.append(Kind(", ".join(coverage.saved), len(coverage.saved), coverage.saved_parameters))
            yield tuple(kinds)
        finally:
            bank.detach()


def _planned(job: Job, rows: Rows, kinds: tuple[Kind, ...], goes_on_from: int) -> Plan:
    from lora_kit.train.trial import tried

    model, recipe = job.base.model, job.recipe
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lora_kit-"))
        stack.enter_context(repeatable(job.base.device))
        stack.enter_context(borrowed(model))
        if recipe.compile:
            stack.enter_context(compiled_layers(model))
        steps = _steps(job, folder)
        measured, memory = tried(job, steps, folder=folder)
        trainable = sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
        parameters = model.num_parameters()
    data = _data(job, rows)
    tokens = data.tokens * (steps.steps - goes_on_from) / steps.per_epoch
    return Plan(
        out=Path(recipe.out),
        goes_on_from=goes_on_from,
        trainable=trainable,
        parameters=parameters,
        kinds=kinds,
        data=data,
        steps=steps,
        memory=memory,
        measured=measured,
        seconds=tokens * measured.seconds / measured.tokens,
        recipe=recipe,
    )


def _data(job: Job, rows: Rows) -> Data:
    recipe, samples = job.recipe, job.train.samples if isinstance(job.train, Packed) else job.train
    spec, text = recipe.data, recipe.data.chat_template
    assert spec.max_length is not None
    found = measure(
        rows,
        job.base.tokenizer,
        max_length=spec.max_length,
        separator=spec.separator,
        template=ChatTemplate(text, "the recipe's chat template") if text else None,
        label2id={name: number for number, name in enumerate(job.labels)},
        task=recipe.task,
    )
    return Data(
        rows=len(rows),
        samples=len(samples),
        tokens=samples.num_tokens,
        labels=samples.num_labels,
        cut=len(found.cut),
        longest=spec.max_length,
    )


def _steps(job: Job, folder: str) -> Steps:
    args = training_arguments(job.recipe.train, device=job.base.device, folder=folder, name=job.recipe.name)
    micro, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    batches = len(job.train) // micro if args.dataloader_drop_last else math.ceil(len(job.train) / micro)
    per_epoch = max(1, math.ceil(batches / accumulation))
    count = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    return Steps(count, args.get_warmup_steps(count), per_epoch, micro * accumulation, micro, accumulation)
