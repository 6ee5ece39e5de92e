"""Two steps of a training, done to be measured: one of the longest samples there are, then one of any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from lora_kit.data.batches import EncodedDataset
from lora_kit.data.packing import PackedDataset
from lora_kit.torch_utils import Clock
from lora_kit.training.job.job import Job
from lora_kit.training.loop.learning_rates import LearningRates
from lora_kit.training.loop.trainer import Trainer
from lora_kit.training.plan.memory_estimate import MemoryEstimate, estimate_memory
from lora_kit.training.recipe.training_arguments import build_training_arguments
from lora_kit.training.results import StepCounts, StepMeasurement

_DROPPED_KEYS = ("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "early_stopping_patience",
              "eval_on_start", "lr_scheduler_kwargs", "num_train_epochs", "dataloader_drop_last")  # fmt: skip
_DRY_RUN_ARGUMENTS: Mapping[str, Any] = {
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
    """Samples of a data set at some places, in that order."""

    def __init__(self, samples: EncodedDataset | PackedDataset, places: list[int]) -> None:
        self.kind, self._samples, self._positions = samples.kind, samples, places

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self._samples[self._positions[index]]


class _StepTimer(transformers.TrainerCallback):
    """Time and tokens of the steps."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.trainer: Any = None
        self.ends: list[tuple[float, int]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.ends:
            self.ends.append((self._clock.seconds, self.trainer.tokens))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append((self._clock.seconds, self.trainer.tokens))


def _count_row_tokens(samples: EncodedDataset | PackedDataset) -> torch.Tensor:
    """Tokens of each row: int64 (rows,)."""
    if isinstance(samples, EncodedDataset):
        return samples.lengths
    return torch.stack([samples.samples.lengths[list(row)].sum() for row in samples.rows])


def measure_dry_run(job: Job, steps: StepCounts, *, folder: str) -> tuple[StepMeasurement, MemoryEstimate]:
    """Do two steps, the first of which also warms up what is slow only once; the model's trained tensors change.

    Args:
        folder: of transformers' own, which nothing is written to.
    """
    batch = min(steps.batch, len(job.train))
    longest = _count_row_tokens(job.train).argsort(descending=True, stable=True)[:batch].tolist()
    some = torch.randperm(len(job.train), generator=torch.Generator().manual_seed(job.recipe.seed))[:batch].tolist()
    micro = min(steps.micro_batch, batch)
    short = -batch % micro  # a step is of whole micro-batches here
    places = [*longest, *longest[:short], *some, *some[:short]]
    section = {name: value for name, value in job.recipe.train.items() if name not in _DROPPED_KEYS}
    section |= {
        **_DRY_RUN_ARGUMENTS,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": -(-batch // micro),
    }
    args = build_training_arguments(section, device=job.base.device, folder=folder, name=job.recipe.name)
    clock = Clock(job.base.device)
    timer, chosen = _StepTimer(clock), _SampleSelection(job.train, places)
    trainer = Trainer(
        job.base.model,
        args,
        train=chosen,  # type: ignore[arg-type]
        validation=None,
        collator=job.collator,
        callbacks=[timer],
        rates=LearningRates.of(job.recipe.train, job.recipe.task),
    )
    timer.trainer = trainer
    try:
        trainer.train()
    finally:
        trainer.close()
    (_, _), (first, before), (second, after) = timer.ends
    rows = min(trainer.micro_batch, micro)
    found = StepMeasurement(
        second - first, after - before, clock.peak_bytes, steps.micro_batch if rows == micro else rows
    )
    row = job.train[longest[0]]
    return found, estimate_memory(trainer, row, rows=min(found.micro_batch, len(job.train)))
