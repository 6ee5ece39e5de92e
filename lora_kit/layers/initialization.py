"""How LoRA weights are initialized: at random, or from the weight of their layer as PiSSA and OLoRA do.

    PiSSA   A₀ = √(Σ/s) Vᵀ,  B₀ = U √(Σ/s)    of the r largest singular values of W = U Σ Vᵀ
    OLoRA   A₀ = R,          B₀ = Q           the first r rows and columns of W = Q R

(Meng et al. 2024, arXiv 2404.02948; Büyükakyüz 2024, arXiv 2406.01775.) As published, s · B₀ A₀ is subtracted from W,
and W - s B₀ A₀ + s B A is trained from there. Here W stays as it is, and the differences to the initialization are
trained: A = A₀ + D_A and B = B₀ + D_B, where D_A and D_B begin at zero and have the gradients of A and B. What is added
to the base is

    s · (B A - B₀ A₀) = s · [D_B, B₀] [A₀ + D_A; D_A]

which are plain LoRA weights of rank 2r. At the start it is exactly zero, while [B, -B₀] [A; A₀] would be zero up to
rounding only. While D_A and D_B are small it is small too, so that in 16 bits no large terms cancel. Weight decay
shrinks D_A and D_B, and so draws the model to the base, as with any LoRA. As published, it would shrink A and B, and
with them what was subtracted from W.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from lora_kit.errors import TargetError
from lora_kit.layers.dequantize import dequantize_module_weight
from lora_kit.layers.introspect import PLAIN_TENSOR_TYPES, is_stored_transposed
from lora_kit.layers.slot_entry import CONSTANT_PREFIX, SlotEntry

logger = logging.getLogger(__name__)

A: Final = "lora_A"
B: Final = "lora_B"
MAGNITUDE: Final = "lora_magnitude_vector"
"""What an adapter brings to a layer, in PEFT's words."""
INITIAL_A: Final = CONSTANT_PREFIX + A
INITIAL_B: Final = CONSTANT_PREFIX + B
"""A₀ and B₀, which are not trained. A slot that has them holds D_A and D_B as its A and B."""

_OVERSAMPLING: Final = 8
"""Directions that a randomized decomposition computes beyond those it returns, to make these more exact."""
_LOG_INTERVAL: Final = 10.0
"""Seconds between two lines of the log."""


# Initial values


class WeightInitializer:
    """Computes A₀ and B₀ of an adapter's layers, one after another, and logs the progress of long work.

    Args:
        init: `LoraConfig.init_lora_weights`: `pissa`, `pissa_niter_N` or `olora` where layers are asked for.
        count: number of the layers.
    """

    def __init__(self, init: bool | str, count: int) -> None:
        self._init, self._count, self._done = init, count, 0
        self._last_logged = time.monotonic()

    def compute(self, path: str, module: nn.Module, *, rank: int, scaling: float) -> dict[str, Tensor]:
        """Return A₀ (r, in) and B₀ (out, r) of a layer, fp32, by their names.

        Raises:
            TargetError: its weight cannot be read, or its smaller side is below the rank.
        """
        weight = _read_dense_weight(path, module)
        if rank > min(weight.shape):
            size = " × ".join(str(each) for each in weight.shape)
            raise TargetError(
                f"{path}: init_lora_weights={self._init} needs a rank of at most {min(weight.shape)} for a weight of "
                f"{size}; {rank} was given",
                hint="lower r, or the rank of this layer in rank_pattern",
            )
        a, b = decompose_weight(weight, str(self._init), rank=rank, scaling=scaling)
        b = b.mT.contiguous().mT  # the memory order of stacked weights
        self._done += 1
        if time.monotonic() - self._last_logged > _LOG_INTERVAL:
            self._last_logged = time.monotonic()
            quicker = "; pissa_niter_16 takes a fraction of the time" if self._init == "pissa" else ""
            logger.info("%s: %d of %d layers are initialized%s", self._init, self._done, self._count, quicker)
        return {INITIAL_A: a, INITIAL_B: b}


@torch.no_grad()
def decompose_weight(weight: Tensor, init: str, *, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return A₀ (r, in) and B₀ (out, r) of a weight.

    `pissa` computes the full singular value decomposition, O(out · in · min(out, in)). `pissa_niter_N` computes a
    randomized one of N subspace iterations (Halko et al. 2009, arXiv 0909.4061), O(out · in · r · N), from torch's
    random state: for 2,048 × 2,048 and r = 16, 16 of them took a twentieth of the time. Of what the full one finds,
    they find 99.7 % for a random 512 × 768 (94 % with N = 4), where no direction stands out, and all but 10⁻⁶ for a
    weight whose singular values fall as 1/√i. Training starts at W in any case: what a decomposition misses stays in
    the base.

    Args:
        weight: (out, in) fp32.
        rank: r, at most the smaller side of the weight.
        scaling: s; where it is negative, the sign of B₀ is flipped.
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
    """Return the weight of a linear layer, (out, in) in fp32; a quantized one is dequantized."""
    weight = dequantize_module_weight(module)
    if weight is None:
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and hasattr(weight, "dequantize") and type(weight) not in PLAIN_TENSOR_TYPES:
            weight = weight.dequantize()
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise TargetError(
            f"{path}: the weight of a {type(module).__name__} cannot be read, and the initialization needs it",
            hint="init_lora_weights: true needs no weight",
        )
    dense = weight.detach().float()
    return dense.mT if is_stored_transposed(module) else dense


# What an initialized slot computes with


def has_initialization(entry: SlotEntry) -> bool:
    """Return whether a slot was initialized from its layer's weight."""
    return INITIAL_A in entry.tensors


def lora_weights_of(entry: SlotEntry) -> tuple[Tensor, Tensor]:
    """Return the A and B that are added to the base: (r, in) and (out, r), or with an initialization of rank 2r.

    Differentiable.
    """
    tensors = entry.tensors
    if INITIAL_A not in tensors:
        return tensors[A], tensors[B]
    return join_initialization(tensors[A], tensors[B], tensors[INITIAL_A], tensors[INITIAL_B])


def negate_initialization(entry: SlotEntry) -> tuple[Tensor, Tensor]:
    """Return A₀ and -B₀, which subtract the initialization from the base."""
    return entry.tensors[INITIAL_A], -entry.tensors[INITIAL_B]


def compute_trained_weights(entry: SlotEntry) -> tuple[Tensor, Tensor]:
    """Return A₀ + D_A and B₀ + D_B, the A and B of the publications. Differentiable."""
    tensors = entry.tensors
    if INITIAL_A not in tensors:
        return tensors[A], tensors[B]
    return tensors[INITIAL_A] + tensors[A], tensors[INITIAL_B] + tensors[B]


def join_initialization(a: Tensor, b: Tensor, initial_a: Tensor, initial_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return [A₀ + D_A; D_A] (2r, in) and [D_B, B₀] (out, 2r), in memory the rank before the features.

    Args:
        a, b: D_A (r, in) and D_B (out, r).
        initial_a, initial_b: A₀ and B₀, of the same shapes.
    """
    return torch.cat([initial_a + a, a]), torch.cat([b.mT, initial_b.mT]).mT


def split_initialization(a: Tensor, b: Tensor, initial_a: Tensor, initial_b: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the D_A and D_B from which `join_initialization` made A and B, bit for bit; None where it did not."""
    rank = initial_a.shape[0]
    if a.shape[0] != 2 * rank or b.shape[1] != 2 * rank:
        return None
    moved_a, moved_b = a[rank:], b[:, :rank]
    matches = torch.equal(a[:rank], initial_a + moved_a) and torch.equal(b[:, rank:], initial_b)
    return (moved_a, moved_b) if matches else None


def replace_initialized_slots(
    stacked: tuple[Tensor, Tensor],
    entries: Sequence[SlotEntry | None],
    weights_of: Callable[[SlotEntry], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Return stacked A and B in which the slots with an initialization hold other weights; differentiable.

    Args:
        stacked: (slots, R, in) and (slots, out, R); not written to.
        weights_of: makes A and B of such a slot.
    """
    stacked_a, stacked_b = stacked[0].clone(), stacked[1].clone()
    for slot, entry in enumerate(entries):
        if entry is not None and has_initialization(entry):
            a, b = weights_of(entry)
            stacked_a[slot, : a.shape[0]], stacked_b[slot, :, : b.shape[1]] = a, b
    return stacked_a, stacked_b


def initialize_lora(a: Tensor, b: Tensor, *, kind: str, init: bool | str) -> None:
    """Fill new LoRA weights in place, as PEFT does: `B A` is zero unless `init` is False.

    Args:
        a: (r, in), Kaiming-uniform, or normal with standard deviation 1/r for `"gaussian"`.
        b: (out, r), zero.
        kind: of the layer, as `kind_of` names it. For an embedding A is zero and B normal.
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
