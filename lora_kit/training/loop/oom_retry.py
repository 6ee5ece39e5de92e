"""A step during which memory runs out is repeated with fewer rows at once; its gradient is the same.

The loss of a step is a sum over its labels divided by their number, so the number of rows in a forward pass does not
change it. A batch of 8 rows as two of 4 gives what a recipe with half the micro-batch and twice the accumulation gives,
to the last bit and to the last random number.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Final, TypeAlias

import torch
from torch import Tensor

from lora_kit.errors import OutOfMemoryError
from lora_kit.torch_utils import (
    capture_random_states,
    is_out_of_memory,
    restore_random_states,
    translate_out_of_memory,
)

OUT_OF_MEMORY_HINT: Final = (
    "train.gradient_checkpointing: true, a smaller data.max_length, quantize: nf4, or a smaller lora.r"
)
Batch: TypeAlias = Mapping[str, Tensor]
"""Tensors (rows, …) by name, as the collator joins them."""
LabelCount: TypeAlias = "Tensor | int | None"
"""The number of labels of a step."""


def translate_training_memory() -> contextlib.AbstractContextManager[None]:
    """Raise an OutOfMemoryError where memory runs out in the block and a smaller micro-batch would not help."""
    return translate_out_of_memory(
        "memory ran out outside of the forward and backward passes",
        hint="a smaller train.per_device_eval_batch_size, train.optim: adamw_8bit, or quantize: nf4",
    )


class MicroBatches:
    """The batches of one optimizer step, split into micro-batches that are halved when memory runs out.

    A step that failed is repeated from its beginning: gradients cleared, random states restored, the same rows in the
    same order.

    Args:
        rows: rows of a micro-batch, at most.
        run: runs forward and backward of a micro-batch, and returns its share of the step's loss: ().
        clear_gradients: sets all gradients to zero or None.
        on_halved: called with the new number of rows.

    Attributes:
        rows: rows of a micro-batch, at most.
    """

    def __init__(
        self,
        rows: int,
        *,
        run: Callable[[Batch, LabelCount], Tensor],
        clear_gradients: Callable[[], None],
        on_halved: Callable[[int], None],
    ) -> None:
        self.rows = rows
        self._run, self._clear_gradients, self._on_halved = run, clear_gradients, on_halved
        self.begin_step()

    def begin_step(self) -> None:
        """Forget the batches of the step before."""
        self._batches: list[Batch] = []
        self._losses: list[Tensor] = []
        self._random_states: dict[str, object] = {}

    def run_batch(self, batch: Batch, label_count: LabelCount) -> Tensor:
        """Run one more batch of the step.

        Args:
            label_count: of the whole step, passed on to `run`.

        Returns:
            The increase of the step's loss: (). Where the step was repeated, it includes what changed in the losses of
            the batches before this one.

        Raises:
            StorageError: there is not enough memory for a single row.
        """
        if not self._batches:
            self._random_states = capture_random_states()
        self._batches.append(batch)
        if self._try_batches([batch], label_count):
            return self._losses[-1]
        before = self._losses
        while True:
            self._halve_rows()
            self._losses = []
            if self._try_batches(self._batches, label_count):
                return sum_losses(self._losses) - (sum_losses(before) if before else 0)

    def _try_batches(self, batches: list[Batch], label_count: LabelCount) -> bool:
        """Run some batches and keep their losses; return whether memory sufficed."""
        try:
            for batch in batches:
                parts = split_into_micro_batches(batch, self.rows)
                self._losses.append(sum_losses([self._run(part, label_count) for part in parts]))
        except RuntimeError as error:
            if is_out_of_memory(error):
                return False
            raise
        return True

    def _halve_rows(self) -> None:
        """Undo what the failed step did, and halve the rows of a micro-batch."""
        rows = min(self.rows, max(count_batch_rows(batch) for batch in self._batches))
        self._clear_gradients()
        # Tensors of the failed step are referenced by cycles of frames and tracebacks.
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if rows == 1:
            raise OutOfMemoryError("memory ran out with one row at once", hint=OUT_OF_MEMORY_HINT)
        self.rows = (rows + 1) // 2
        restore_random_states(self._random_states)
        self._on_halved(self.rows)


def split_into_micro_batches(batch: Batch, rows: int) -> Iterator[Batch]:
    """Yield a batch in parts of at most `rows` rows, in order."""
    if count_batch_rows(batch) <= rows:
        yield batch
        return
    for start in range(0, count_batch_rows(batch), rows):
        yield {name: tensor[start : start + rows] for name, tensor in batch.items()}


def count_batch_rows(batch: Batch) -> int:
    """Return the number of rows of a batch."""
    return len(next(iter(batch.values())))


def sum_losses(losses: list[Tensor]) -> Tensor:
    """Return the sum of scalar losses: ()."""
    return torch.stack(losses).sum()
