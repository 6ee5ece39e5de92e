"""A warning about trained tensors without a gradient: the base never calls their layer, or reads its weight itself."""

from __future__ import annotations

import logging

import transformers
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from lora_kit.errors import format_list

logger = logging.getLogger(__name__)


class UnusedParameterCallback(transformers.TrainerCallback):
    """Warns, with the first line of the log, of trained tensors that received no gradient in any step so far.

    It is no error, since an expert that no token was routed to yet has no gradient either.
    """

    def __init__(self) -> None:
        self._without_gradient: set[str] | None = None
        self._is_reported = False

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        assert model is not None
        if self._without_gradient is None or self._without_gradient:
            trained = [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]
            without = {name for name, tensor in trained if tensor.grad is None}
            self._without_gradient = without if self._without_gradient is None else self._without_gradient & without

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if self._is_reported or self._without_gradient is None:
            return
        self._is_reported = True
        if self._without_gradient:
            layers = sorted({name.rpartition(".")[0] for name in self._without_gradient})
            logger.warning(
                "%s received no gradient in %d steps and learns nothing: the base does not call it, "
                "or reads its weight itself (lora.exclude_modules leaves it out)",
                format_list(layers),
                state.global_step,
            )
