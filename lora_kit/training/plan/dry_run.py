"""Two steps of a training, run to measure them: one of the longest samples, then one of random samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
import transformers
from transformers import TrainerControl, TrainerState, TrainingArguments

from lora_kit.data.batches import EncodedDataset
from lora_kit.torch_utils import Clock
from lora_kit.training.job.job import Job
from lora_kit.training.loop.learning_rates import LearningRates
from lora_kit.training.loop.trainer import Samples, Trainer
from lora_kit.training.plan.memory_estimate import MemoryEstimate, estimate_memory
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


class _SampleSelection(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Samples of a data set at some positions, in that order."""

    def __init__(self, samples: Samples, positions: list[int]) -> None:
        self.kind, self._samples, self._positions = samples.kind, samples, positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self._samples[self._positions[index]]


class _StepTimer(transformers.TrainerCallback):
    """Records time and tokens at the end of each step.

    Attributes:
        trainer: whose steps are recorded.
        ends: (seconds since the start, tokens trained on so far) at the end of each step.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.trainer: Trainer | None = None
        self.ends: list[tuple[float, int]] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        assert self.trainer is not None
        self.ends.append((self._clock.seconds, self.trainer.tokens))


def _count_row_tokens(samples: Samples) -> torch.Tensor:
    """Return the number of tokens of each row: int64 (rows,)."""
    if isinstance(samples, EncodedDataset):
        return samples.lengths
    return torch.stack([samples.samples.lengths[list(row)].sum() for row in samples.rows])


def measure_dry_run(job: Job, steps: StepCounts, *, folder: str) -> tuple[StepMeasurement, MemoryEstimate]:
    """Run two steps and measure the second; the first also pays for what is slow only once.

    The trained tensors of the model change.

    Args:
        folder: the output folder that transformers requires; nothing is written to it.
    """
    batch = min(steps.batch, len(job.train))
    micro_batch = min(steps.micro_batch, batch)
    longest = _count_row_tokens(job.train).argsort(descending=True, stable=True)[:batch].tolist()
    drawn = torch.randperm(len(job.train), generator=torch.Generator().manual_seed(job.recipe.seed))[:batch].tolist()
    missing = -batch % micro_batch  # here a step consists of complete micro-batches
    samples = _SampleSelection(job.train, [*longest, *longest[:missing], *drawn, *drawn[:missing]])
    clock = Clock(job.base.device)
    timer = _StepTimer(clock)
    trainer = Trainer(
        job.base.model,
        _build_arguments(job, batch=batch, micro_batch=micro_batch, folder=folder),
        train=samples,  # type: ignore[arg-type]
        validation=None,
        collator=job.collator,
        callbacks=[timer],
        rates=LearningRates.of(job.recipe.train, job.recipe.task),
        class_weights=job.class_weights,
    )
    timer.trainer = trainer
    try:
        trainer.train()
    finally:
        trainer.close()
    (first_seconds, first_tokens), (second_seconds, second_tokens) = timer.ends
    measurement = StepMeasurement(
        seconds=second_seconds - first_seconds,
        tokens=second_tokens - first_tokens,
        peak_bytes=clock.peak_bytes,
        micro_batch=trainer.micro_batch if trainer.micro_batch < micro_batch else steps.micro_batch,
    )
    rows = min(measurement.micro_batch, len(job.train))
    return measurement, estimate_memory(trainer, job.train[longest[0]], rows=rows)


def _build_arguments(job: Job, *, batch: int, micro_batch: int, folder: str) -> transformers.TrainingArguments:
    """Return the job's arguments for two steps that nothing interrupts."""
    section = {name: value for name, value in job.recipe.train.items() if name not in _DROPPED_KEYS}
    sizes = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": -(-batch // micro_batch)}
    section = {**section, **_DRY_RUN_ARGUMENTS, **sizes}
    return build_training_arguments(section, device=job.base.device, folder=folder, name=job.recipe.name)
