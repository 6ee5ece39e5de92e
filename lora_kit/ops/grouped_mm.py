"""Products of rows that are sorted by group, each group with a matrix of its own."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

_KERNEL_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT_BYTES: Final = 16
"""The kernel requires the size of every row to be a multiple of this, of gradients as well."""


def grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return xᵢ W[g(i)] for every row i of group g(i): one kernel, however many groups there are, and no row is copied.

    Args:
        x: (n, in), the rows of one group after another.
        weight: (G, in, out), of the same dtype.
        ends: (G,) int32, ascending: the end of each group, which may be empty; the last one is n.

    Returns:
        (n, out), differentiable with respect to x and weight.
    """
    if _has_kernel(x) and all(_is_aligned(tensor) for tensor in (x, weight, weight.mT)):
        return functional.grouped_mm(x, weight, offs=ends)
    bounds = [0, *ends.tolist()]
    # The kernel does not follow autocast, so this does not either.
    with torch.autocast(x.device.type, enabled=False):
        parts = [
            x[start:end] @ matrix
            for start, end, matrix in zip(bounds[:-1], bounds[1:], weight.unbind(), strict=True)
            if end > start
        ]
    return torch.cat(parts)


def round_up_rank(rank: int, dtype: torch.dtype) -> int:
    """Return the smallest rank, not below this one, for which a kernel takes factors; pad them with zeros to it."""
    multiple = _ALIGNMENT_BYTES // dtype.itemsize
    return -(-rank // multiple) * multiple


def _has_kernel(x: Tensor) -> bool:
    if x.device.type == "cuda":
        return x.dtype in _KERNEL_DTYPES and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return x.dtype in _KERNEL_DTYPES and x.device.type == "cpu"


def _is_aligned(tensor: Tensor) -> bool:
    size = tensor.element_size()
    strides = [stride for stride in tensor.stride()[-2:] if stride != 1]
    whole = len(strides) == 1 and not strides[0] * size % _ALIGNMENT_BYTES
    return whole and not tensor.shape[-1] * size % _ALIGNMENT_BYTES and not tensor.data_ptr() % _ALIGNMENT_BYTES
