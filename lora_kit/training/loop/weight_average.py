"""An exponential moving average of the trained tensors: Polyak and Juditsky 1992."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class WeightAverage:
    """The average `e_t = d * e_(t-1) + (1 - d) * w_t` of tensors `w` after each step t; `e_0` is `w_0`.

    It is kept in fp32, or fp64, whatever the dtype of the tensors is.

    Args:
        decay: d, above 0 and below 1.
        tensors: `w_0` by name.
    """

    def __init__(self, decay: float, tensors: Mapping[str, Tensor]) -> None:
        self._decay = decay
        self.tensors = {name: _copy_precisely(tensor) for name, tensor in tensors.items()}

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor]) -> None:
        """Take in the tensors after a step."""
        for name, average in self.tensors.items():
            average.lerp_(tensors[name].detach().to(average.dtype), 1 - self._decay)

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Go on from the averages of a checkpoint."""
        for name, average in self.tensors.items():
            average.copy_(values[name])

    @torch.no_grad()
    def copy_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the averages into tensors, rounded to their dtypes."""
        for name, average in self.tensors.items():
            tensors[name].copy_(average)

    @contextlib.contextmanager
    def swap_into(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Put the averages in the place of tensors until the block ends; then these are as before, bit for bit."""
        before = {name: tensors[name].detach().clone() for name in self.tensors}
        try:
            self.copy_to(tensors)
            yield
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    tensors[name].copy_(value)


def _copy_precisely(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
