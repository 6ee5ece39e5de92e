"""Whether the loss depends on what is trained: a layer that the base never calls, or reads past, learns nothing."""

from __future__ import annotations

import logging
from typing import Any

import transformers

from lora_kit.errors import format_list

logger = logging.getLogger(__name__)


class UnusedParameterCallback(transformers.TrainerCallback):
    """Says with the first line of the log which trained tensors no gradient has come to by then.

    A warning and no error: an expert that no token was sent to yet is such a tensor too.
    """

    def __init__(self) -> None:
        self._without_gradient: set[str] | None = None
        self._said = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._without_gradient is None or self._without_gradient:
            trained = {name: each for name, each in kwargs["model"].named_parameters() if each.requires_grad}
            without = {name for name, each in trained.items() if each.grad is None}
            self._without_gradient = without if self._without_gradient is None else self._without_gradient & without

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._said or self._without_gradient is None:
            return
        self._said = True
        if self._without_gradient:
            layers = sorted({name.rpartition(".")[0] for name in self._without_gradient})
            logger.warning(
                "nothing is learned in %s: no gradient came there in %d steps, since the base does not call it "
                "or reads its weight itself (lora.exclude_modules leaves it out)",
                format_list(layers),
                state.global_step,
            )
