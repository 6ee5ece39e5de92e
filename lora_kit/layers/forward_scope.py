"""A forward of a model that is running: its route, and what is known of how its batch lies in the inputs of layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import FrameType

from torch import Tensor

from lora_kit.layers.route import Route
from lora_kit.layers.route_stack import is_running


class ForwardScope:
    """A call of the model, from its first hook to its last.

    Layers are given the batch in several shapes: (B, T, in), (B·windows, n, in), tokens (B·T, in). A row's entries must
    be consecutive there. What shows that they are not is refused, and so is what shows nothing.

    Attributes:
        route: that the forward uses, whatever is chosen meanwhile.
        batch: B, how many rows the model was given; None where its inputs do not say.
        frame: of the call; None in a recomputation.
        outer: the forward inside which this one was called.
    """

    def __init__(
        self,
        route: Route,
        inputs: Sequence[Tensor],
        *,
        frame: FrameType | None = None,
        outer: ForwardScope | None = None,
    ) -> None:
        self.route = route
        self.batch = inputs[0].shape[0] if inputs else None
        self.frame = frame
        self.outer = outer
        self._others = {x.shape[0] for x in inputs if x.shape[0] != self.batch}
        self._lengths: set[int] = set()
        for x in inputs:
            self._remember(1, leading_sizes(x)[1:])

    @property
    def is_running(self) -> bool:
        """Whether this forward called the caller; not so after it was interrupted, or in another thread."""
        return self.frame is not None and is_running(self.frame)

    def reason_not_by_row(self, x: Tensor) -> str | None:
        """Return why an input of a layer cannot be split into the rows of the batch; None where it can.

        Args:
            x: (n, ..., in), or integers (n, ...) that are looked up.
        """
        batch, sizes = self.batch, leading_sizes(x)
        assert batch is not None
        if not sizes:
            return "is given no batch"
        first, rest = sizes[0], sizes[1:]
        if first != batch:
            if first == 1:
                return f"is given one input for all {batch} rows, as relative positions are"
            if rest and rest[0] == batch:
                return f"is given the sequence before the batch, {tuple(sizes)} for {batch} rows"
            if first % batch or first in self._others:
                return f"was given a batch of {first} in a forward of {batch} rows"
            # Of windows and the like nothing else is known than that they are more than the batch.
            if (not rest or not x.is_floating_point()) and first // batch not in self._lengths:
                return f"is given {first} entries, and nothing shows which of the {batch} rows they belong to"
        self._remember(first // batch, rest)
        return None

    def _remember(self, count: int, rest: Sequence[int]) -> None:
        """Remember how many entries a row has in an input: later layers may be given them one by one."""
        if rest:
            self._lengths |= {count * rest[0], count * math.prod(rest)}


def leading_sizes(x: Tensor) -> Sequence[int]:
    """Return the sizes of x without its features: all of them, of integers that are looked up."""
    return x.shape[:-1] if x.is_floating_point() else x.shape
