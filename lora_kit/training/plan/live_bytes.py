"""Count the bytes of all tensors that are alive, and products: also on tensors without memory."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class TooManyOperationsError(Exception):
    """More operations than may be counted."""


class LiveBytes(TorchDispatchMode):
    """A mode under which every storage that an operation returns is counted until it is freed.

    Views share a storage, which counts once. What an operation uses inside itself does not count.

    Args:
        device: whose tensors count; None for those of all.
        most_operations: how many that return a tensor may be run; None for any number.

    Raises:
        TooManyOperationsError: in the block, at the first operation beyond them.

    Attributes:
        now: bytes that are alive.
        peak: the most that ever were.
        flops: multiplications and additions of matrix products, as torch counts them.
    """

    def __init__(self, device: torch.device | None = None, *, most_operations: int | None = None) -> None:
        super().__init__()
        self._device, self._left = device, math.inf if most_operations is None else most_operations
        self.now = self.peak = self.flops = 0
        self._sizes: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        """Count a tensor that is there already."""
        if self._device not in (None, tensor.device):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self._left -= bool(tensors)  # what returns none only asks, as for a tensor's device: most calls do
        if self._left < 0:
            raise TooManyOperationsError
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=output)
        for tensor in tensors:
            self.add(tensor)
        return output
