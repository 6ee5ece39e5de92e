"""The moments of transformers' training loop at which a loop of ours does something."""

from __future__ import annotations

from typing import Protocol

import transformers
from transformers import TrainerControl, TrainerState, TrainingArguments


class LoopMoments(Protocol):
    """A loop that does something at some moments."""

    def begin_training(self) -> None:
        """Before the first step."""

    def begin_epoch(self) -> None:
        """Before the samples of an epoch are drawn."""

    def end_step(self, control: TrainerControl) -> None:
        """After the optimizer's step, before the log, the evaluation and the checkpoint."""

    def end_epoch(self, control: TrainerControl) -> None:
        """After the last step of an epoch, before its log, evaluation and checkpoint."""


class MomentsCallback(transformers.TrainerCallback):
    """Calls the methods of a loop at its moments."""

    def __init__(self, trainer: LoopMoments) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._trainer.begin_training()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._trainer.begin_epoch()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._trainer.end_step(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._trainer.end_epoch(control)
