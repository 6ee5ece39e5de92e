"""DoRA (Liu et al. 2024, arXiv 2402.09353): the adapted weight keeps its direction and gets a trained norm per row.

W' = m / |W + s B A| · (W + s B A)        |.| per row, m (out,) trained, the norm constant in the backward
"""

from __future__ import annotations

import torch
from torch import Tensor


def dora_scale(weight: Tensor, a: Tensor, b: Tensor, scaling: float, magnitude: Tensor) -> Tensor:
    """Return c = m / |W + s B A|, which every output of `lora_add` is multiplied by, except for the bias.

    The norms are computed in rank space, |W|² + 2 s (W Aᵀ)·B + s² (B A Aᵀ)·B, so `B A` is never formed.

    Args:
        weight: W (out, in).
        a: (r, in).
        b: (out, r).
        scaling: s.
        magnitude: m (out,), the only one that gets a gradient.

    Returns:
        (out,) fp32.
    """
    with torch.no_grad():
        # Rounded to the base's dtype as in `lora_add`, so that fp32 masters and bf16 stacked weights give one scale.
        a, b = a.to(weight.dtype).float(), b.to(weight.dtype).float()
        weight = weight.float()
        square = torch.linalg.vecdot(weight, weight)
        square += 2 * scaling * torch.linalg.vecdot(weight @ a.mT, b)
        square += scaling**2 * torch.linalg.vecdot(b @ (a @ a.mT), b)
        norm = square.clamp_min_(0).sqrt_()
    scale: Tensor = magnitude.float() / norm
    return scale


def scale_columns(y: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """Return columns · (y - bias) + bias, computed in fp32 and rounded once to the dtype of y.

    Args:
        y: (..., out).
        columns: fp32, (out,) or any shape that broadcasts with y.
        bias: (out,), or None for zero.
    """
    scaled = y * columns
    if bias is not None:
        scaled = scaled + (1 - columns) * bias
    return scaled.to(y.dtype)
