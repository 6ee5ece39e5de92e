"""One layer that a config covers: its sizes, its rank, and the shapes of its LoRA weights."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerTarget:
    """A layer with LoRA weights: A (rank, in_features), B (out_features, rank).

    Attributes:
        path: of the layer; of a parameter, it ends in the parameter's name.
        kind: `linear`, `embedding` (in_features are its entries, out_features its dimension), `convolution` (they are
            its channels) or `parameter`.
        in_features: width of A.
        out_features: height of B.
        rank: height of A and width of B.
        scaling: factor of `B A x`.
        dora: whether it has a magnitude (out_features,) as well.
        experts: how many matrices a parameter has, each with its own A and B.
        kernel: kernel size of a convolution, else empty.
        stored_path: what an adapter's file calls a parameter; empty for other kinds, whose files use `path`.
        starts_from_weight: whether A and B are initialized from the layer's weight, so that the adapter is saved, and
            loaded, with twice the rank.
    """

    path: str
    kind: str
    in_features: int
    out_features: int
    rank: int
    scaling: float
    dora: bool = False
    experts: int = 1
    kernel: tuple[int, ...] = ()
    stored_path: str = ""
    starts_from_weight: bool = False

    @property
    def key(self) -> str:
        """Its path in an adapter's file."""
        return self.stored_path or self.path

    @property
    def slot_rank(self) -> int:
        """The rank that a slot needs for it."""
        return 2 * self.rank if self.starts_from_weight else self.rank

    @property
    def rows(self) -> int:
        """Rows of A: the rank, once for each expert."""
        return self.rank * self.experts

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B."""
        return (self.rows, self.in_features, *self.kernel), (self.out_features, self.rows, *[1] * len(self.kernel))

    @property
    def parameters(self) -> int:
        """Elements of A, B and the magnitude."""
        return sum(math.prod(shape) for shape in self.shapes) + (self.out_features if self.dora else 0)
