"""How many adapters go through the frozen layers at once, by measurement.

More rows share what reading the weights costs; fewer stay in the caches. The result of a training does not depend on
it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Final

_PASSES: Final = 2
"""How often each adapter is computed with a size before the size is judged."""


@dataclass
class _Measurement:
    parts: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def cost(self) -> float:
        return self.seconds / max(1, self.tokens)


class GroupSize:
    """Tries all adapters at once, then halves of them down to one, and from then on takes the quickest.

    Args:
        most: adapters at once, at most.
    """

    def __init__(self, most: int) -> None:
        self._measured: defaultdict[int, _Measurement] = defaultdict(_Measurement)
        self._most = most
        self._is_warm = False

    def choose(self, active: int) -> int:
        """Return the size of the next group, where so many adapters are trained now."""
        most = min(active, self._most)
        sizes = sorted({most, *(2**exponent for exponent in range(most.bit_length()))}, reverse=True)
        untried = [size for size in sizes if self._measured[size].parts < _PASSES * active]
        return untried[0] if untried else min(sizes, key=lambda size: self._measured[size].cost)

    def record(self, size: int, *, tokens: int, seconds: float) -> None:
        """Take in how long forward and backward of a group took. The first group of all only warms the process up."""
        if self._is_warm:
            measured = self._measured[size]
            measured.parts += size
            measured.tokens += tokens
            measured.seconds += seconds
        self._is_warm = True

    def limit(self, size: int) -> None:
        """Choose no size above this one any more: memory ran out."""
        self._most = max(1, size)
