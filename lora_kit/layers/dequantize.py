"""The weights that bitsandbytes quantized, as floats again: the only calls of its dequantizing kernels.

The proof of a merge calls none of this: `merging/checkpoint/bnb_decode.py` computes the same a second time.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState


def dequantize_four_bit(codes: Tensor, state: QuantState) -> Tensor:
    """Return `code · scale` of a 4-bit weight, in the shape and dtype that its state names.

    The codes are read as one row: where a row of a matrix is not a whole number of blocks, bitsandbytes 0.50 takes the
    wrong scales on a CPU.
    """
    from bitsandbytes.functional import dequantize_4bit

    flat = copy.copy(state)
    flat.shape = torch.Size([state.shape.numel()])
    weight: Tensor = dequantize_4bit(codes, flat)
    return weight.view(state.shape)


def dequantize_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """Return `code · scale / 127` of an 8-bit weight, fp32.

    Args:
        codes: (out, in) int8.
        scales: (out,) the largest absolute value of each row.
    """
    from bitsandbytes.functional import int8_vectorwise_dequant

    weight: Tensor = int8_vectorwise_dequant(codes, scales)
    return weight


def dequantize_module_weight(module: nn.Module) -> Tensor | None:
    """Return the weight of a bitsandbytes layer as floats (out, in); None for a layer of another kind."""
    weight = module._parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    if weight is None:
        return None
    if state is not None:
        return dequantize_four_bit(weight.data, state)
    # bitsandbytes' layer takes the scales over from the weight at the first forward.
    scales = getattr(weight, "SCB", None)
    scales = getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales
    return dequantize_int8(weight.data, scales) if weight.dtype == torch.int8 and scales is not None else None
