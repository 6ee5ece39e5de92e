"""What a training would do, before it does it: counted, estimated, and two steps of it measured. Nothing is written."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lora_kit.data.encode import encode_with_faults
from lora_kit.data.packing import PackedDataset
from lora_kit.data.rows import Rows
from lora_kit.models.loading import Base
from lora_kit.models.locate import silence_libraries
from lora_kit.training.job.job import Job, check_output_available, check_output_writable, prepare_job, read_recipe_rows
from lora_kit.training.job.methods import TrainableJob, make_job_trainable
from lora_kit.training.loop.checkpoints import RunFolder
from lora_kit.training.loop.contexts import compile_layers, preserve_model_settings, use_deterministic_kernels
from lora_kit.training.loop.oom_retry import translate_out_of_memory
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.recipe.recipe import Recipe
from lora_kit.training.recipe.training_arguments import build_training_arguments, check_reporting
from lora_kit.training.results import DataSummary, StepCounts, TrainPlan


def plan(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    base: Base | None = None,
    overrides: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> TrainPlan:
    """Say what `train` would do with the same arguments; nothing is trained and nothing is written.

    Two steps are done to measure them, on an adapter that is thrown away; a base that is given is the same afterwards.

    Raises:
        LoraKitError: whatever `train` would refuse before its first step.
    """
    wanted = load_recipe(recipe, overrides=overrides)
    check_output_writable(wanted)
    check_reporting(wanted.train)
    with silence_libraries():
        check_output_available(wanted, replace=replace)
        rows = read_recipe_rows(wanted)
        job = prepare_job(wanted, rows, base)
        found = RunFolder(wanted.out).preview_resumable(job.identity, replace=replace)
        with (
            translate_out_of_memory(),
            _preserve_torch_random_states(job.base.device),
            make_job_trainable(job) as ready,
        ):
            return _build_plan(ready, rows[0], found.step if found else 0)


def _preserve_torch_random_states(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Torch's generators as they were, afterwards."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _build_plan(ready: TrainableJob, rows: Rows, goes_on_from: int) -> TrainPlan:
    from lora_kit.training.plan.dry_run import measure_dry_run

    job = ready.job
    model, recipe = job.base.model, job.recipe
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lora_kit-"))
        stack.enter_context(use_deterministic_kernels(job.base.device))
        stack.enter_context(preserve_model_settings(model))
        if recipe.compile:
            stack.enter_context(compile_layers(model))
        steps = _count_steps(job, folder)
        measured, memory = measure_dry_run(job, steps, folder=folder)
    data = _summarize_data(job, rows)
    tokens = data.tokens * (steps.steps - goes_on_from) / steps.per_epoch
    return TrainPlan(
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


def _summarize_data(job: Job, rows: Rows) -> DataSummary:
    samples = job.train.samples if isinstance(job.train, PackedDataset) else job.train
    result = encode_with_faults(rows, job.base.tokenizer, job.sample_format)
    return DataSummary(
        rows=len(rows),
        samples=len(samples),
        tokens=samples.num_tokens,
        labels=samples.num_labels,
        cut=len(result.cut),
        longest=job.sample_format.max_length,
    )


def _count_steps(job: Job, folder: str) -> StepCounts:
    args = build_training_arguments(job.recipe.train, device=job.base.device, folder=folder, name=job.recipe.name)
    micro, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    batches = len(job.train) // micro if args.dataloader_drop_last else math.ceil(len(job.train) / micro)
    per_epoch = max(1, math.ceil(batches / accumulation))
    count = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    return StepCounts(count, args.get_warmup_steps(count), per_epoch, micro * accumulation, micro, accumulation)
