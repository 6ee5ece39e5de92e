"""What a training has of the process: random states, and what accelerate shares between all its objects.

Trainings that take turns in one process each find it as they left it.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


class RandomStream:
    """The state of torch's random numbers, of the CPU and of the CUDA devices, to draw from it at another time.

    Attributes:
        cpu: of the CPU's generator.
        cuda: of those of the devices; empty where CUDA is not in use.
    """

    def __init__(self, cpu: Tensor, cuda: list[Tensor]) -> None:
        self.cpu, self.cuda = cpu, cuda

    @classmethod
    def capture(cls) -> RandomStream:
        """Return the present state."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])

    def restore(self) -> None:
        """Let torch draw from this state on."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)

    def copy(self) -> RandomStream:
        """Return a state that draws the same numbers as this one."""
        return RandomStream(self.cpu, self.cuda)

    @contextlib.contextmanager
    def draw(self) -> Iterator[None]:
        """Draw from this state within a block, and keep where it ended."""
        self.restore()
        yield
        after = RandomStream.capture()
        self.cpu, self.cuda = after.cpu, after.cuda


@dataclass
class TurnState:
    """The state of the process that one training left.

    Attributes:
        torch: random numbers of torch.
        numpy, python: of numpy, and of Python.
        accelerate: what its objects share, a copy for each of their classes.
    """

    torch: RandomStream
    numpy: Any  # numpy does not declare it
    python: tuple[Any, ...]
    accelerate: list[dict[str, object]]

    @classmethod
    def capture(cls) -> TurnState:
        """Return the present state."""
        return cls(
            RandomStream.capture(),
            np.random.get_state(),
            random.getstate(),
            [dict(shared) for shared in _list_shared_states()],
        )

    def restore(self) -> None:
        """Make this the state of the process."""
        self.torch.restore()
        np.random.set_state(self.numpy)
        random.setstate(self.python)
        for shared, content in zip(_list_shared_states(), self.accelerate, strict=True):
            # In place: every object of the class has this dictionary as its own.
            shared.clear()
            shared.update(content)


def _list_shared_states() -> list[dict[str, object]]:
    """Return the dictionaries that accelerate's objects share: mixed precision, and whether gradients are complete."""
    from accelerate.state import (  # type: ignore[import-untyped]
        AcceleratorState,
        GradientState,
        PartialState,
    )

    return [each._shared_state for each in (PartialState, AcceleratorState, GradientState)]
