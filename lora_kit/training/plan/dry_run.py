"""Two steps of a training, run to measure them: one of the longest samples, then one of random samples."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, Final

import torch
import transformers
from transformers import TrainerControl, TrainerState, TrainingArguments

from lora_kit.data.preference_samples import PreferenceDataset
from lora_kit.data.prompt_samples import PromptDataset
from lora_kit.models.frozen_prefix import estimate_saved_share
from lora_kit.models.tasks import TARGET
from lora_kit.torch_utils import Clock
from lora_kit.training.job.job import Job
from lora_kit.training.job.loops import build_preference_loop, build_prefix_cache
from lora_kit.training.job.methods import TrainableJob
from lora_kit.training.loop.checkpoints import RunFolder
from lora_kit.training.loop.learning_rates import LearningRates
from lora_kit.training.loop.length_buckets import find_largest_parts
from lora_kit.training.loop.run_state import RunContext
from lora_kit.training.loop.sharded_base import is_sharded
from lora_kit.training.loop.signals import StopRequest
from lora_kit.training.loop.trainer import Samples, Trainer
from lora_kit.training.loop.training_loop import TrainingLoop
from lora_kit.training.loop.world import World
from lora_kit.training.plan.memory_use import MemoryUse, count_evaluation, count_memory
from lora_kit.training.prefix.prefix_choice import TRAIN, VALIDATION, PrefixChoice
from lora_kit.training.recipe.objectives import SFT, count_answers
from lora_kit.training.recipe.training_arguments import build_training_arguments
from lora_kit.training.results import StepCounts, StepMeasurement

_DROPPED_KEYS: Final = (
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "early_stopping_patience",
    "eval_on_start",
    "lr_scheduler_kwargs",
    "num_train_epochs",
    "dataloader_drop_last",
)
_GENERATION_KEYS: Final = ("num_iterations", "steps_per_generation", "generation_batch_size")
"""Keys by which several steps learn from one generation."""
_DRY_RUN_ARGUMENTS: Final[Mapping[str, object]] = {
    "max_steps": 2,
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
    "disable_tqdm": True,
}


class _SampleSelection(torch.utils.data.Dataset[dict[str, object]]):
    """Samples of a data set at some positions, in that order."""

    num_labels = 0

    def __init__(self, samples: Samples | PreferenceDataset | PromptDataset, positions: list[int]) -> None:
        self.kind, self._samples, self._positions = samples.kind, samples, positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._samples[self._positions[index]]


class _StepTimer(transformers.TrainerCallback):
    """Records time and tokens at the end of each step.

    Attributes:
        trainer: whose steps are recorded.
        ends: (seconds since the start, tokens trained on so far) at the end of each step.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.trainer: TrainingLoop | None = None
        self.ends: list[tuple[float, int]] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        assert self.trainer is not None
        self.ends.append((self._clock.seconds, self.trainer.tokens))


def measure_dry_run(
    trainable: TrainableJob, steps: StepCounts, *, folder: str, world: World
) -> tuple[StepMeasurement, MemoryUse, str | None]:
    """Run two steps and measure the second; the first also pays for what is slow only once.

    The third value says what becomes of the frozen layers below the trained ones; None for the loops of TRL.

    The trained tensors of the model change.

    Args:
        folder: the output folder that transformers requires; nothing is written to it.
        world: the processes that share the rows of a step.
    """
    job = trainable.job
    answers = count_answers(job.recipe.objective, job.recipe.train)
    batch, micro_batch = _size_step(job, steps, answers, world)
    positions = _choose_rows(job, -(-batch // micro_batch) * micro_batch // answers)
    clock = Clock(job.base.device)
    timer = _StepTimer(clock)
    args = _build_arguments(job, batch=batch, micro_batch=micro_batch, folder=folder)
    trainer = _build_loop(trainable, args, positions, timer, world)
    timer.trainer = trainer
    before = clock.peak_bytes
    try:
        trainer.train()
    finally:
        trainer.close()
    (first_seconds, first_tokens), (second_seconds, second_tokens) = timer.ends
    rows, rows_at_first = min(world.gather(trainer.micro_batch)), -(-micro_batch // world.size)
    share = steps.batch / batch if answers > 1 else 1.0
    measurement = StepMeasurement(
        seconds=max(world.gather(second_seconds - first_seconds)) * share,
        tokens=round((second_tokens - first_tokens) * share),
        peak_bytes=max(world.gather(clock.peak_bytes)),
        before_bytes=max(world.gather(before)),
        peak_of="device" if job.base.device.type == "cuda" else "process",
        micro_batch=rows if rows < rows_at_first else steps.micro_batch,
    )
    frozen = _choose_frozen_layers(job, trainer, steps) if isinstance(trainer, Trainer) else None
    rows = min(measurement.micro_batch, len(job.train) * answers)
    if isinstance(trainer, Trainer) and frozen is not None:
        memory = _count_training(job, trainer, frozen, positions, rows=rows)
    else:
        memory = _count_first(job, trainer, positions, rows=rows)
    memory = max(world.gather(memory), key=lambda each: each.total)
    return measurement, memory, None if frozen is None else str(frozen)


def _count_training(job: Job, trainer: Trainer, frozen: PrefixChoice, positions: list[int], *, rows: int) -> MemoryUse:
    if is_sharded(trainer.model):  # whose batches are not split by length
        return _count_first(job, trainer, positions, rows=rows)
    if job.train.kind == TARGET:  # what a decoder has is not in the lengths
        memory = _count_first(job, trainer, positions, rows=rows)
    else:
        memory = _count_largest(job, trainer, frozen, rows=rows)
    return dataclasses.replace(memory, evaluation=_count_evaluation(job, trainer))


def _count_first(job: Job, trainer: TrainingLoop, positions: list[int], *, rows: int) -> MemoryUse:
    """Return what rows need that are as long as the first one of the loop, which is the longest."""
    lengths = job.train.lengths[positions].tolist()
    shorter = [place for place, length in enumerate(lengths) if length < lengths[0]][:1]
    samples = [trainer.train_dataset[place] for place in (0, *shorter)]
    return count_memory(trainer, samples, rows=rows, length=lengths[0] + job.sample_format.answer_tokens)


def _count_largest(job: Job, trainer: Trainer, frozen: PrefixChoice, *, rows: int) -> MemoryUse:
    """Return what the largest forward and backward needs that batches of these rows are split into."""
    lengths, order = job.train.lengths.sort(descending=True, stable=True)
    computed = 1.0
    if frozen.computer is not None:
        computed -= estimate_saved_share(job.base.model, frozen.computer.prefix)
    uses = []
    for part in sorted(find_largest_parts(lengths, rows=rows, device=job.base.device, computed=computed)):
        samples = [job.train[int(order[index])] for index in dict.fromkeys((part.longest, part.shorter))]
        uses.append(count_memory(trainer, samples, rows=part.rows, length=int(lengths[part.longest])))
    return max(uses, key=lambda use: use.total)


def _count_evaluation(job: Job, trainer: Trainer) -> int:
    """Return what an evaluation needs for its longest rows; 0 without one."""
    if job.validation is None:
        return 0
    size = trainer.args.per_device_eval_batch_size
    longest = job.validation.lengths.argsort(descending=True, stable=True)[:size].tolist()
    return count_evaluation(trainer, job.validation.select(longest), job.collator)


def _size_step(job: Job, steps: StepCounts, answers: int, world: World) -> tuple[int, int]:
    """Return the rows of a step and of a forward pass: of complete micro-batches, where there are rows enough.

    Where the model generates, a row is an answer, and each step has all answers to its prompts.
    """
    if answers > 1:
        whole = math.lcm(steps.micro_batch, answers)
        return whole * max(1, steps.batch // whole), steps.micro_batch
    batch = min(steps.batch, len(job.train))
    return batch, min(steps.micro_batch * world.size, batch)


def _choose_rows(job: Job, count: int) -> list[int]:
    """Return the positions of the longest rows, for the first step, and of random ones, for the second."""
    longest = job.train.lengths.argsort(descending=True, stable=True)[:count].tolist()
    drawn = torch.randperm(len(job.train), generator=torch.Generator().manual_seed(job.recipe.seed))[:count].tolist()
    return [*itertools.islice(itertools.cycle(longest), count), *itertools.islice(itertools.cycle(drawn), count)]


def _choose_frozen_layers(job: Job, trainer: Trainer, steps: StepCounts) -> PrefixChoice:
    run = RunContext(folder=RunFolder(job.recipe.out), identity={}, setting={}, stop=StopRequest())
    splits = {TRAIN: job.train, **({} if job.validation is None else {VALIDATION: job.validation})}
    cache = build_prefix_cache(job, run)
    return trainer.choose_prefix(cache, splits, passes=steps.steps * steps.batch / len(job.train))


def _build_loop(
    trainable: TrainableJob,
    args: transformers.TrainingArguments,
    positions: list[int],
    timer: _StepTimer,
    world: World,
) -> TrainingLoop:
    """Return the job's loop on samples at some positions, in that order."""
    job = trainable.job
    samples = _SampleSelection(job.train, positions)
    if job.recipe.objective != SFT:
        run = RunContext(folder=RunFolder(job.recipe.out), identity={}, setting={}, stop=StopRequest(), world=world)
        return build_preference_loop(trainable, args, train=samples, validation=None, callbacks=[timer], run=run)
    return Trainer(
        job.base.model,
        args,
        train=samples,  # type: ignore[arg-type]
        validation=None,
        collator=job.collator,
        callbacks=[timer],
        rates=LearningRates.of(job.recipe.train, job.recipe.task),
        class_weights=job.class_weights,
        world=world,
    )


def _build_arguments(job: Job, *, batch: int, micro_batch: int, folder: str) -> transformers.TrainingArguments:
    """Return the job's arguments for two steps that nothing interrupts."""
    section = {name: value for name, value in job.recipe.train.items() if name not in _DROPPED_KEYS}
    sizes = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": -(-batch // micro_batch)}
    section = {**section, **_DRY_RUN_ARGUMENTS, **sizes}
    if count_answers(job.recipe.objective, job.recipe.train) > 1:  # each step generates, and keeps our order
        section = {key: value for key, value in section.items() if key not in _GENERATION_KEYS}
        section["shuffle_dataset"] = False
    return build_training_arguments(
        section, device=job.base.device, folder=folder, name=job.recipe.name, objective=job.recipe.objective
    )
