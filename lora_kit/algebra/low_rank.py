"""Low-rank updates as factors, and their algebra in rank space: the dense product is never formed.

    D = B A,  B = Q_b R_b,  Aᵀ = Q_a R_a   ⇒   D = Q_b (R_b R_aᵀ) Q_aᵀ

The core `R_b R_aᵀ` is k × k, and its SVD is that of D: `O((out + in) k²)` where a dense one takes `O(out · in · min)`.
The sum of updates is their factors side by side. All in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kit.adapter.peft_keys import LoraWeights


def compute_singular_values(b: Tensor, a: Tensor) -> Tensor:
    """Return the singular values of `B A`, which are those of its core; see `compute_core`.

    Shapes: b (out, r), a (r, in), of any floating dtype; returns float64 (min(r, out, in),), falling.
    """
    values: Tensor = torch.linalg.svdvals(compute_core(b, a))
    return values


def compute_core(b: Tensor, a: Tensor) -> Tensor:
    """Return `R_b R_aᵀ` of `B = Q_b R_b` and `Aᵀ = Q_a R_a`: it has the singular values and the norm of `B A`.

    The product is never formed, and nothing is squared.

    Shapes: b (out, r), a (r, in), of any floating dtype; returns float64 (min(r, out), min(r, in)).
    """
    b, a = b.detach().double(), a.detach().double()
    core: Tensor = torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T
    return core


@dataclass(frozen=True)
class LowRankUpdate:
    """An update D = B A.

    Attributes:
        b: float64 (out, k).
        a: float64 (k, in).
    """

    b: Tensor
    a: Tensor

    @classmethod
    def of(cls, weights: LoraWeights, scaling: float) -> LowRankUpdate:
        """Return `scaling · B A`, the scaling in B."""
        return cls(weights.b.double() * scaling, weights.a.double())

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of D."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """k: columns of B."""
        return self.b.shape[1]

    def scale_by(self, number: float) -> LowRankUpdate:
        return LowRankUpdate(self.b * number, self.a)

    def dense(self) -> Tensor:
        """Return D: float32 (out, in)."""
        return self.b.float() @ self.a.float()

    def round_to_float32(self) -> LowRankUpdate:
        """Return the update with its factors rounded to float32, as files hold them."""
        return LowRankUpdate(self.b.float().double(), self.a.float().double())

    def norm(self) -> float:
        """Return the Frobenius norm of D, right to rounding also where terms cancel; Gram matrices would lose that."""
        return float(compute_core(self.b, self.a).norm())

    def inner(self, other: LowRankUpdate) -> float:
        """Return `⟨D, D'⟩ = tr(Dᵀ D')`."""
        return float(((self.b.T @ other.b) * (self.a @ other.a.T)).sum())

    def values(self) -> Tensor:
        """Return the singular values of D: (k,), falling."""
        return compute_singular_values(self.b, self.a)

    def svd(self) -> ThinSvd:
        q_b, r_b = torch.linalg.qr(self.b)
        q_a, r_a = torch.linalg.qr(self.a.T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        return ThinSvd(q_b @ u, s, vh @ q_a.T)


@dataclass(frozen=True)
class ThinSvd:
    """The thin SVD of an update: `D = U diag(s) Vᵀ`.

    Attributes:
        u: float64 (out, k).
        s: float64 (k,), falling.
        vh: float64 (k, in).
    """

    u: Tensor
    s: Tensor
    vh: Tensor

    def best(self, rank: int) -> LowRankUpdate:
        """Return the nearest update of a rank (Eckart, Young 1936); both factors share each singular value evenly."""
        root = self.s[:rank].sqrt()
        return LowRankUpdate(self.u[:, :rank] * root, root[:, None] * self.vh[:rank])


def find_smallest_rank(squares: Tensor, least: float) -> int:
    """Return how many of the first squared singular values add up to at least `least`: 1 or more.

    All of them where rounding keeps even their sum below it.
    """
    enough = squares.cumsum(0) >= least
    return int(enough.to(torch.uint8).argmax()) + 1 if enough.any() else len(squares)


def sum_updates(terms: Iterable[LowRankUpdate]) -> LowRankUpdate:
    """Return `Σ D_i`, exactly: the factors side by side; ranks add."""
    updates = list(terms)
    return LowRankUpdate(torch.cat([one.b for one in updates], dim=1), torch.cat([one.a for one in updates], dim=0))


def compute_distance(one: LowRankUpdate, other: LowRankUpdate) -> float:
    """Return `‖D - D'‖` in the Frobenius norm."""
    return sum_updates([one, other.scale_by(-1.0)]).norm()


def compute_relative_error(distance: float, norm: float) -> float:
    """Return `distance / norm`; for a norm of 0 it is 0 for no distance, and infinite for any other."""
    if distance == 0.0:
        return 0.0
    return distance / norm if norm else math.inf
