"""Pairs that start from the weight of their layer, as PiSSA's and OLoRA's do, beside a base that stays as it is.

    PiSSA   A₀ = √(Σ/s) Vᵀ,  B₀ = U √(Σ/s)    of the r largest singular values of W = U Σ Vᵀ
    OLoRA   A₀ = R,          B₀ = Q           the first r rows and columns of W = Q R

(Meng et al. 2024, arXiv 2404.02948; Büyükakyüz 2024, arXiv 2406.01775.) As they were published, W loses s · B₀ A₀, and
W - s B₀ A₀ + s B A is trained from there. Here W stays, and what is trained is how far the pair has come: A = A₀ + D_A
and B = B₀ + D_B, where D_A and D_B begin at zero and have the gradients of A and B. What is added to the base is

    s · (B A - B₀ A₀) = s · [D_B, B₀] [A₀ + D_A; D_A]

a plain pair of rank 2r. At the start it is zero, and not only nearly so as [B, -B₀] [A; A₀] would be; and while the
pair has not come far it is small, so that in 16 bits no large terms cancel. Weight decay draws D_A and D_B to zero, and
so the model to the base, as with any LoRA; as published it would draw A and B there, and with them what they took out
of W.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from lora_kit.errors import TargetError
from lora_kit.layers.dequantize import dequantize_module_weight
from lora_kit.layers.introspect import is_stored_transposed
from lora_kit.layers.slot_layer import CONSTANT_PREFIX, SlotEntry

logger = logging.getLogger(__name__)

A: Final = "lora_A"
B: Final = "lora_B"
MAGNITUDE: Final = "lora_magnitude_vector"
"""What an adapter brings to a layer, in PEFT's words."""
INITIAL_A: Final = CONSTANT_PREFIX + A
INITIAL_B: Final = CONSTANT_PREFIX + B
"""A₀ and B₀, which are not trained; a slot that has them holds D_A and D_B as its A and B."""

_OVERSAMPLING: Final = 8
"""Directions that a randomised decomposition looks at besides those asked for: they make these more exact."""
_LOG_INTERVAL: Final = 10.0
"""Seconds between two lines of the log."""


# How they begin


class WeightInitializer:
    """The starts of an adapter's layers, one after another; long work is logged.

    Args:
        init: `LoraConfig.init_lora_weights`; starts are asked for where it is `pissa`, `pissa_niter_N` or `olora`.
        count: of the layers.
    """

    def __init__(self, init: bool | str, count: int) -> None:
        self._init, self._count, self._done = init, count, 0
        self._told = time.monotonic()

    def of(self, path: str, module: nn.Module, *, rank: int, scaling: float) -> dict[str, Tensor]:
        """A₀ (r, in) and B₀ (out, r) of a layer, fp32, by their names.

        Raises:
            TargetError: its weight cannot be read, or has fewer directions than that.
        """
        weight = _read_dense_weight(path, module)
        if rank > min(weight.shape):
            size = " × ".join(str(each) for each in weight.shape)
            raise TargetError(
                f"{path}: init_lora_weights={self._init} has no {rank} directions of a weight of {size}",
                hint=f"a rank of {min(weight.shape)} at the most there (r, or rank_pattern)",
            )
        a, b = decompose_weight(weight, str(self._init), rank=rank, scaling=scaling)
        b = b.mT.contiguous().mT  # as it lies in a slab
        self._done += 1
        if time.monotonic() - self._told > _LOG_INTERVAL:
            self._told = time.monotonic()
            quicker = "; pissa_niter_16 takes a fraction of the time" if self._init == "pissa" else ""
            logger.info("%s: %d of %d layers have a start%s", self._init, self._done, self._count, quicker)
        return {INITIAL_A: a, INITIAL_B: b}


@torch.no_grad()
def decompose_weight(weight: Tensor, init: str, *, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A₀ (r, in) and B₀ (out, r) of a weight.

    `pissa` takes the whole singular value decomposition, O(out · in · min(out, in)). `pissa_niter_N` takes a randomised
    one of N subspace iterations (Halko et al. 2009, arXiv 0909.4061), O(out · in · r · N), from torch's random state:
    for 2,048 × 2,048 and r = 16, 16 of them took a twentieth of the time. They find, of what the whole one does, 99.7 %
    of a random 512 × 768 (94 % with N = 4), where no direction stands out, and all but 10⁻⁶ of one whose singular
    values fall as 1/√i. Training starts at W in any case: what a decomposition leaves out stays in the base.

    Args:
        weight: (out, in) fp32. rank: at most the smaller of the two. scaling: s; where it is negative, so is B₀.
    """
    if init == "olora":
        # The first columns of Q are those of the first columns of W alone.
        q = torch.linalg.qr(weight[:, :rank]).Q
        return (q.mT @ weight).triu(), q
    if init == "pissa":
        u, values, vt = torch.linalg.svd(weight, full_matrices=False)
    else:
        iterations = int(init.rpartition("_")[2])
        u, values, v = torch.svd_lowrank(weight, q=min(rank + _OVERSAMPLING, *weight.shape), niter=iterations)
        vt = v.mT
    root = (values[:rank] / abs(scaling)).sqrt()
    sign = 1.0 if scaling > 0 else -1.0
    return root.unsqueeze(1) * vt[:rank], u[:, :rank] * (sign * root)


def _read_dense_weight(path: str, module: nn.Module) -> Tensor:
    """The weight of a linear layer, (out, in) in fp32; of a quantised one, what it stands for.

    Raises:
        TargetError: it is quantised in a way that is not known here.
    """
    weight: Any = dequantize_module_weight(module)
    if weight is None:
        weight = getattr(module, "weight", None)
        if hasattr(weight, "dequantize") and type(weight) not in (Tensor, nn.Parameter):
            weight = weight.dequantize()
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        raise TargetError(
            f"{path}: the weight of a {type(module).__name__} cannot be read, and a start is made from it",
            hint="init_lora_weights: true needs no weight",
        )
    dense: Tensor = weight.detach().float()
    return dense.mT if is_stored_transposed(module) else dense


# What a slot with a start computes with


def has_initialization(entry: SlotEntry) -> bool:
    return INITIAL_A in entry.tensors


def lora_weights_of(entry: SlotEntry) -> tuple[Tensor, Tensor]:
    """What is added to the base: A (r, in) and B (out, r); with a start (2r, in) and (out, 2r). Differentiable."""
    held = entry.tensors
    if INITIAL_A not in held:
        return held[A], held[B]
    return join_initialization(held[A], held[B], held[INITIAL_A], held[INITIAL_B])


def negated_initialization_of(entry: SlotEntry) -> tuple[Tensor, Tensor]:
    """A₀ and -B₀: what takes the start out of the base."""
    return entry.tensors[INITIAL_A], -entry.tensors[INITIAL_B]


def trained_weights_of(entry: SlotEntry) -> tuple[Tensor, Tensor]:
    """A₀ + D_A and B₀ + D_B: the pair as it was published. Differentiable."""
    held = entry.tensors
    if INITIAL_A not in held:
        return held[A], held[B]
    return held[INITIAL_A] + held[A], held[INITIAL_B] + held[B]


def join_initialization(a: Tensor, b: Tensor, start_a: Tensor, start_b: Tensor) -> tuple[Tensor, Tensor]:
    """[A₀ + D_A; D_A] (2r, in) and [D_B, B₀] (out, 2r), in memory the rank before the features, as in a slab."""
    return torch.cat([start_a + a, a]), torch.cat([b.mT, start_b.mT]).mT


def split_initialization(a: Tensor, b: Tensor, start_a: Tensor, start_b: Tensor) -> tuple[Tensor, Tensor] | None:
    """D_A and D_B of a pair that `joined` has made of them and this start, bit for bit; None of any other pair."""
    rank = start_a.shape[0]
    if a.shape[0] != 2 * rank or b.shape[1] != 2 * rank:
        return None
    moved_a, moved_b = a[rank:], b[:, :rank]
    fits = torch.equal(a[:rank], start_a + moved_a) and torch.equal(b[:, rank:], start_b)
    return (moved_a, moved_b) if fits else None


def replace_initialized_slots(
    slabs: tuple[Tensor, Tensor],
    entries: Sequence[SlotEntry | None],
    pair: Callable[[SlotEntry], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Slabs A and B in which the slots with a start hold what `pair` makes of it; differentiable.

    Args:
        slabs: as they are, (slots, R, in) and (slots, out, R); not written to.
    """
    slab_a, slab_b = slabs[0].clone(), slabs[1].clone()
    for slot, entry in enumerate(entries):
        if entry is not None and has_initialization(entry):
            a, b = pair(entry)
            slab_a[slot, : a.shape[0]], slab_b[slot, :, : b.shape[1]] = a, b
    return slab_a, slab_b


def initialize_lora(a: Tensor, b: Tensor, *, kind: str, init: bool | str) -> None:
    """Fill a fresh pair in place, as PEFT does: `B A` is zero unless `init` is False.

    Args:
        a: (r, in), Kaiming-uniform, or normal with deviation 1/r for `"gaussian"`. b: (out, r), zero.
        kind: for an embedding A is zero and B normal.
        init: `LoraConfig.init_lora_weights`.
    """
    with torch.no_grad():
        if kind == "embedding":
            a.zero_() if init else a.normal_()
            b.normal_()
        else:
            if init == "gaussian":
                a.normal_(std=1 / a.shape[0])
            else:
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            b.zero_() if init else nn.init.kaiming_uniform_(b, a=math.sqrt(5))
