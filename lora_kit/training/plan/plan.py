"""What a training would do: counted, and two steps of it measured. Nothing is written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit.data.batches import EncodedDataset
from lora_kit.data.packing import PackedDataset
from lora_kit.models.loading import Base
from lora_kit.models.silence import silence_libraries
from lora_kit.torch_utils import preserve_random_states
from lora_kit.training.job.job import Job
from lora_kit.training.job.loops import build_job_arguments
from lora_kit.training.job.methods import TrainableJob, make_job_trainable
from lora_kit.training.job.output import check_output_available, check_output_writable
from lora_kit.training.loop.checkpoints import RunFolder
from lora_kit.training.loop.contexts import set_up_training
from lora_kit.training.loop.oom_retry import translate_training_memory
from lora_kit.training.loop.world import World, join_world
from lora_kit.training.recipe.coerce import Section
from lora_kit.training.recipe.load import RecipeSource, load_recipe
from lora_kit.training.results import DataSummary, StepCounts, TrainPlan

if TYPE_CHECKING:
    from transformers import TrainingArguments


def plan(
    recipe: RecipeSource, *, base: Base | None = None, overrides: Section | None = None, replace: bool = False
) -> TrainPlan:
    """Return what `train` would do with the same arguments; nothing is trained and nothing is written.

    Two steps are run to measure them, on an adapter that is thrown away. A base that is given is unchanged afterwards.

    Raises:
        LoraKitError: whatever `train` would raise before its first step.
    """
    with join_world() as world, silence_libraries():
        loaded = load_recipe(recipe, overrides=overrides)
        check_output_writable(loaded)
        check_output_available(loaded, replace=replace)
        job = Job.open(loaded, base, processes=world.size)
        checkpoint = RunFolder(loaded.out).preview_resumable(job.identity, job.environment, replace=replace)
        with (
            translate_training_memory(),
            preserve_random_states(job.base.device),
            make_job_trainable(job) as trainable,
        ):
            return _build_plan(trainable, world, first_step=checkpoint.step if checkpoint else 0)


def _build_plan(trainable: TrainableJob, world: World, *, first_step: int) -> TrainPlan:
    from lora_kit.training.plan.dry_run import measure_dry_run

    job = trainable.job
    with set_up_training(job.base, compiled=job.recipe.compile) as scratch:
        steps = _count_steps(job, scratch, world)
        measured, memory, frozen = measure_dry_run(trainable, steps, folder=scratch, world=world)
    data = _summarize_data(job)
    steps_left = steps.steps - first_step
    # Where the model generates, its answers are no rows of the data.
    tokens = measured.tokens if job.sample_format.answer_tokens else data.tokens / steps.per_epoch
    return TrainPlan(
        out=Path(job.recipe.out),
        goes_on_from=first_step,
        trainable=trainable.count,
        parameters=trainable.parameters,
        kinds=trainable.kinds,
        head=job.head,
        frozen=frozen,
        data=data,
        steps=steps,
        memory=memory,
        measured=measured,
        seconds=tokens * steps_left * measured.seconds / measured.tokens,
        recipe=job.recipe,
    )


def _summarize_data(job: Job) -> DataSummary:
    samples = job.train if isinstance(job.train, EncodedDataset) else job.train.samples
    return DataSummary(
        rows=job.counts.rows,
        samples=len(samples) if isinstance(job.train, PackedDataset) else len(job.train),
        tokens=samples.num_tokens,
        labels=samples.num_labels,
        cut=job.counts.cut,
        divided=job.counts.divided,
        longest=job.sample_format.max_length,
    )


def _count_batches(job: Job, args: TrainingArguments) -> int:
    """Return the batches of one pass over the data, in all processes."""
    if job.sample_format.answer_tokens:  # the model generates
        options: Any = args
        whole = len(job.train) // (options.generation_batch_size // options.num_generations)
        return int(whole * options.steps_per_generation * options.num_iterations)
    divide = math.floor if args.dataloader_drop_last else math.ceil
    return divide(len(job.train) / args.train_batch_size)


def _count_steps(job: Job, folder: str, world: World) -> StepCounts:
    args = build_job_arguments(job, folder, world)
    micro_batch, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    per_epoch = max(1, math.ceil(_count_batches(job, args) / accumulation))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    return StepCounts(
        steps=steps,
        warmup=args.get_warmup_steps(steps),
        per_epoch=per_epoch,
        batch=micro_batch * accumulation,
        micro_batch=micro_batch // world.size,
        accumulation=accumulation,
        processes=world.size,
    )
