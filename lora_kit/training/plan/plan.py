"""What a training would do, before it does it: counted, estimated, and two steps of it measured. Nothing is written."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lora_kit.data.chat import ChatTemplate
from lora_kit.data.encode import measure
from lora_kit.data.packing import Packed
from lora_kit.data.rows import Rows
from lora_kit.models.loading import Base
from lora_kit.models.locate import quiet
from lora_kit.training.job.job import Job, check_out, check_place, prepared, read
from lora_kit.training.job.methods import Trainable, trainable
from lora_kit.training.loop.checkpoints import RunFolder
from lora_kit.training.loop.contexts import borrowed, compiled_layers, repeatable
from lora_kit.training.loop.oom_retry import explained
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.recipe.recipe import Recipe
from lora_kit.training.recipe.training_arguments import check_reporting, training_arguments
from lora_kit.training.results import Data, Plan, Steps


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
        with explained(), _same_randomness(job.base.device), trainable(job) as ready:
            return _planned(ready, rows[0], found.step if found else 0)


def _same_randomness(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Torch's generators as they were, afterwards."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _planned(ready: Trainable, rows: Rows, goes_on_from: int) -> Plan:
    from lora_kit.training.plan.dry_run import tried

    job = ready.job
    model, recipe = job.base.model, job.recipe
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lora_kit-"))
        stack.enter_context(repeatable(job.base.device))
        stack.enter_context(borrowed(model))
        if recipe.compile:
            stack.enter_context(compiled_layers(model))
        steps = _steps(job, folder)
        measured, memory = tried(job, steps, folder=folder)
    data = _data(job, rows)
    tokens = data.tokens * (steps.steps - goes_on_from) / steps.per_epoch
    return Plan(
        out=Path(recipe.out),
        goes_on_from=goes_on_from,
        trainable=ready.count,
        parameters=ready.parameters,
        kinds=ready.kinds,
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
