"""A forward of a model that is running: its route, and what is known of how its batch lies in the inputs of layers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from types import FrameType
from typing import Final
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lora_kit.layers.route import Route
from lora_kit.layers.route_stack import is_running

Sizes = tuple[int, ...]
_IMAGES_NDIM: Final = 5
"""Axes of several images for each row: (B, images, channels, H, W)."""
_BATCH_FIRST: Final[WeakSet[nn.Module]] = WeakSet()
"""Layers of which a forward has shown that the first axis of their inputs is the batch's."""


class ForwardScope:
    """A call of the model, from its first hook to its last.

    Layers are given the batch in several shapes: (B, T, in), (B·windows, n, in), tokens (B·T, in). A row's entries must
    be consecutive there. What shows that they are not is an error, and so is what shows nothing.

    Attributes:
        route: that the forward uses, whatever is chosen meanwhile.
        batch: B, how many rows the model was given; None where its inputs do not say.
        frame: of the call; None in a recomputation.
        fullest_row: the row with most images, where rows have different numbers of them; None where they do not.
        measure_one_row: return the leading sizes of each layer's inputs in a forward of one row alone; empty where that
            cannot be computed.
        outer: the forward inside which this one was called.
    """

    def __init__(
        self,
        route: Route,
        inputs: Sequence[Tensor],
        *,
        frame: FrameType | None = None,
        measure_one_row: Callable[[], Mapping[nn.Module, set[Sizes]]] = dict,
        outer: ForwardScope | None = None,
    ) -> None:
        self.route = route
        self.batch = inputs[0].shape[0] if inputs else None
        self.frame = frame
        self.measure_one_row = measure_one_row
        self.outer = outer
        self.fullest_row = _find_fullest_row(inputs)
        self._one_row: Mapping[nn.Module, set[Sizes]] | None = None
        self._accepted: set[tuple[torch.Size, bool]] = set()
        self._others = {x.shape[0] for x in inputs if x.shape[0] != self.batch}
        self._lengths: set[int] = set()
        self._shares = {1}
        for x in inputs:
            rest = leading_sizes(x)[1:]
            self._remember(1, rest)
            self._shares |= set(accumulate(rest, operator.mul))

    def finish(self) -> None:
        """End the forward, also for contexts that were made meanwhile; let go what it was called with."""
        self.frame, self.measure_one_row = None, dict

    @property
    def is_running(self) -> bool:
        """Whether this forward called the caller; not so after it was interrupted, or in another thread."""
        return self.frame is not None and is_running(self.frame)

    def reason_not_by_row(self, x: Tensor, layer: nn.Module) -> str | None:
        """Return why an input of a layer cannot be split into the rows of the batch; None where it can.

        Args:
            x: (n, ..., in), or integers (n, ...) that are looked up.
        """
        key = x.shape, x.is_floating_point()
        if key in self._accepted:
            return None
        batch, sizes = self.batch, leading_sizes(x)
        assert batch is not None
        if not sizes:
            return "is given no batch"
        first, rest = sizes[0], sizes[1:]
        if first == 1 != batch:
            return f"is given one input for all {batch} rows, as relative positions are"
        if self.fullest_row is not None and not self._is_batch_first(sizes, layer):
            return f"is given {first} entries, and the {batch} rows have different numbers of images"
        is_ambiguous = self._may_be_batch(rest)
        if is_ambiguous and not self._is_batch_first(sizes, layer):
            return f"is given the sequence before the batch, or nothing of the batch: {tuple(sizes)} for {batch} rows"
        if first != batch:
            if first % batch or first in self._others:
                return f"was given a batch of {first} in a forward of {batch} rows"
            is_known = first // batch in (self._shares if rest else self._lengths)
            if not is_known and not (rest and self._is_batch_first(sizes, layer)):
                return f"is given {first} entries, and nothing shows which of the {batch} rows they belong to"
        self._remember(first // batch, rest)
        if not is_ambiguous:
            self._accepted.add(key)  # most layers of a model are given the same shapes
        return None

    def _may_be_batch(self, rest: Sequence[int]) -> bool:
        """Return whether an axis after the first may be the batch's, by itself or with choices, frames or tokens."""
        batch = self.batch
        assert batch is not None
        return bool(rest) and rest[0] % batch == 0 and rest[0] // batch in self._shares

    def _is_batch_first(self, sizes: Sequence[int], layer: nn.Module) -> bool:
        """Return whether the first axis is the batch's, where sizes alone do not show it.

        Only a forward with fewer rows shows it. What it showed of a layer once is remembered, unless images that only
        fill up a row may be left out.
        """
        is_alike = self.fullest_row is None
        if is_alike and layer in _BATCH_FIRST:
            return True
        assert self.batch is not None
        if self._one_row is None:
            self._one_row = self.measure_one_row()
        shares = self._one_row.get(layer, set())
        is_first = any((self.batch * share[0], *share[1:]) == tuple(sizes) for share in shares if share)
        if not is_first or any(share[:1] == tuple(sizes[:1]) for share in shares):
            return False
        if is_alike:
            _BATCH_FIRST.add(layer)
        return True

    def _remember(self, count: int, rest: Sequence[int]) -> None:
        """Remember how many entries a row has in an input: later layers may be given them one by one."""
        if rest:
            self._lengths |= {count * rest[0], count * math.prod(rest)}


def leading_sizes(x: Tensor) -> Sequence[int]:
    """Return the sizes of x without its features: all of them, of integers that are looked up."""
    return x.shape[:-1] if x.is_floating_point() else x.shape


def _find_fullest_row(inputs: Sequence[Tensor]) -> int | None:
    """Return the row with most images in (B, images, ..., H, W), those left out that are zeros and only fill up a row.

    None where all rows have as many: then models that drop the others split the batch evenly, too.
    """
    for x in inputs:
        if x.ndim >= _IMAGES_NDIM and x.is_floating_point() and x.numel():
            counts = x.flatten(2).any(-1).sum(1)
            if int(counts.min()) != int(counts.max()):
                return int(counts.argmax())
    return None
