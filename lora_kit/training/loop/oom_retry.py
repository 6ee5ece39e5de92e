"""When memory runs out within a step: the same step again with fewer rows at once, and the same gradient.

The loss of a step is a sum over its labels divided by their number, so it does not matter how many rows go through the
model at once. A batch of 8 rows done as two of 4 is what a recipe with half the micro-batch and twice the accumulation
does, to the last bit and to the last random number.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from lora_kit.errors import StorageError
from lora_kit.torch_utils import capture_random_states, restore_random_states

OUT_OF_MEMORY_HINT: Final = (
    "train.gradient_checkpointing: true, a smaller data.max_length, quantize: nf4, or a smaller lora.r"
)
_ALLOCATOR_MESSAGES: Final = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
"""What the CPU's allocator says, in a RuntimeError like any other."""

Batch = Mapping[str, Tensor]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch found no memory, on a device or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATOR_MESSAGES)
    )


@contextlib.contextmanager
def translate_out_of_memory() -> Iterator[None]:
    """Memory that runs out within, where no smaller micro-batch would help, is an error of ours.

    Raises:
        StorageError: memory ran out.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        hint = "a smaller train.per_device_eval_batch_size, train.optim: adamw_8bit, or quantize: nf4"
        raise StorageError("memory ran out outside of the forward and backward passes", hint=hint) from error


class MicroBatches:
    """The batches of one optimiser step, in micro-batches that halve when memory runs out.

    A step that failed is done again from its beginning: gradients cleared, the random states as they were then, the
    same rows in the same order.

    Args:
        rows: through the model at once, at the most.
        work: forward and backward of a micro-batch; gives its share of the step's loss.
        clear: forgets the gradients.
        said: told how many rows there are at once from now on.

    Attributes:
        rows: through the model at once, at the most.
    """

    def __init__(
        self,
        rows: int,
        *,
        work: Callable[[Batch, Any], Tensor],
        clear: Callable[[], None],
        said: Callable[[int], None],
    ) -> None:
        self.rows = rows
        self._work, self._clear, self._said = work, clear, said
        self.begin()

    def begin(self) -> None:
        """A new step."""
        self._batches: list[Batch] = []
        self._losses: list[Tensor] = []
        self._random: dict[str, Any] = {}

    def run_batch(self, batch: Batch, count: Any) -> Tensor:
        """Do one more batch of the step.

        Args:
            count: labels of the whole step, handed on to `work`.

        Returns:
            By how much the loss of the step has grown: (). Where the step had to be done again, what is different in
            the batches before this one is part of it.

        Raises:
            StorageError: memory does not suffice for a single row.
        """
        if not self._batches:
            self._random = capture_random_states()
        self._batches.append(batch)
        if self._done([batch], count):
            return self._losses[-1]
        before = self._losses
        while True:
            self._halve()
            self._losses = []
            if self._done(self._batches, count):
                return sum_losses(self._losses) - (sum_losses(before) if before else 0)

    def _done(self, batches: list[Batch], count: Any) -> bool:
        """Whether memory sufficed."""
        try:
            for batch in batches:
                self._losses.append(
                    sum_losses([self._work(part, count) for part in split_into_micro_batches(batch, self.rows)])
                )
        except RuntimeError as error:
            if is_out_of_memory(error):
                return False
            raise
        return True

    def _halve(self) -> None:
        most = min(self.rows, max(count_batch_rows(batch) for batch in self._batches))
        self._clear()
        # What the failed step held is in cycles of frames and tracebacks.
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if most == 1:
            raise StorageError("memory ran out with one row at once", hint=OUT_OF_MEMORY_HINT)
        self.rows = (most + 1) // 2
        restore_random_states(self._random)
        self._said(self.rows)


def split_into_micro_batches(batch: Batch, rows: int) -> Iterator[Batch]:
    """A batch in order, so many rows at a time; a batch that is not larger as it is."""
    if count_batch_rows(batch) <= rows:
        yield batch
        return
    for start in range(0, count_batch_rows(batch), rows):
        yield {name: tensor[start : start + rows] for name, tensor in batch.items()}


def count_batch_rows(batch: Batch) -> int:
    """Rows of a batch."""
    return len(next(iter(batch.values())))


def sum_losses(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).sum()
