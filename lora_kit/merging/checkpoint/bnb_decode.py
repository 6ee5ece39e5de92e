"""Quantized weights dequantized a second time, code by code and without bitsandbytes.

The proof of a merge uses it. It repeats `bnb_weights` and `layers/dequantize` on purpose: a check that called the code
it checks would repeat its mistakes.
"""

from __future__ import annotations

import json
from typing import Any, Final

import torch
from torch import Tensor

from lora_kit.errors import VerificationError
from lora_kit.merging.checkpoint.bnb_weights import EightBitWeight, QuantizedWeight

_INT8_STEP: Final = 7.874015718698502e-3
"""1/127, in the digits that bitsandbytes multiplies by."""
_NESTED_TOLERANCE: Final = 0.0071
"""Share of its own scale by which a scale stored in 8 bits may be off."""
_NEAREST_TOLERANCE: Final = 1e-4
_MIN_NEAREST: Final = 0.99
"""Share of the values that must be stored as the nearest code; sums in another order round some to a neighbor."""


def dequantize_rows(packed: QuantizedWeight, rows: Tensor) -> Tensor:
    """Return some rows of a quantized weight: (n, in) fp32.

    Args:
        packed: the weight.
        rows: (n,) their indices.
    """
    codes, scales = _read_codes_and_scales(packed, rows)
    return codes * scales * _INT8_STEP if isinstance(packed, EightBitWeight) else _read_code_map(packed)[codes] * scales


def pick_whole_blocks(packed: QuantizedWeight, count: int) -> Tensor:
    """Return about `count` evenly spaced row indices that together make up whole blocks of values."""
    groups = max(packed.shape[0] // packed.step, 1)
    starts = torch.linspace(0, groups - 1, min(max(count // packed.step, 1), groups), dtype=torch.float64).long()
    rows = (starts.unsqueeze(1) * packed.step + torch.arange(packed.step)).reshape(-1)
    return rows[rows < packed.shape[0]]


def check_quantized(packed: QuantizedWeight, rows: Tensor, expected: Tensor, *, exact: float = _MIN_NEAREST) -> None:
    """Raise VerificationError unless values are stored as the nearest code at their scale.

    Args:
        packed: the weight that was written.
        rows: (n,) row indices from `pick_whole_blocks`.
        expected: (n, in) fp64, the values of these rows.
        exact: share of them that must have the nearest code; the others may have the code of a value that rounds to
            another number of the dtype.
    """
    codes, scales = _read_codes_and_scales(packed, rows)
    levels = torch.arange(-127, 128) * _INT8_STEP if isinstance(packed, EightBitWeight) else _read_code_map(packed)
    stored = codes * _INT8_STEP if isinstance(packed, EightBitWeight) else levels[codes]
    rounded = expected.to(packed.dtype).float()
    largest = _compute_block_maximum(
        rounded, packed.shape[1] if isinstance(packed, EightBitWeight) else _read_quant_state(packed)["blocksize"]
    )
    scaled = rounded / largest.clamp_min(torch.finfo(torch.float32).tiny)
    # A block of zeros has the scale 0, so its codes do not matter.
    off = torch.where(largest > 0, (scaled - stored).abs() - _measure_distance(scaled, levels), 0.0)
    unit = torch.finfo(packed.dtype).eps + torch.finfo(torch.float16).eps * isinstance(packed, EightBitWeight)
    nearest = float((off <= _NEAREST_TOLERANCE).float().mean())
    close = bool(((scales - largest).abs() <= unit * largest + _bound_scale_error(packed)).all())
    if nearest < exact or float(off.max()) > 2 * unit or not close:
        raise VerificationError(
            f"{packed.name} was written with other numbers than base + adapter are quantized to: {nearest:.1%} of "
            f"{codes.numel():,} have the nearest code"
        )


def _read_codes_and_scales(packed: QuantizedWeight, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of some rows, (n, in) int64, and the scale of each, (n, in) fp32."""
    parts, name = packed.parts, packed.name
    if isinstance(packed, EightBitWeight):
        scale = parts[f"{name.removesuffix('.weight')}.SCB"][rows].float().unsqueeze(1)
        return parts[name][rows].long(), scale.expand(len(rows), packed.shape[1])
    state = _read_quant_state(packed)
    flat = rows.unsqueeze(1) * packed.shape[1] + torch.arange(packed.shape[1])
    two = parts[name].reshape(-1).view(torch.uint8)[flat // 2]
    codes = torch.where(flat % 2 == 0, two >> 4, two & 15).long()
    block = flat // state["blocksize"]
    scales = parts[f"{name}.absmax"]
    if "nested_offset" not in state:
        return codes, scales[block].float()
    own = parts[f"{name}.nested_absmax"][block // state["nested_blocksize"]]
    inner = parts[f"{name}.nested_quant_map"][scales[block].long()]
    return codes, inner * own + torch.tensor(state["nested_offset"], dtype=torch.float32)


def _compute_block_maximum(values: Tensor, size: int) -> Tensor:
    """Return for every value the largest absolute value of its block."""
    flat = values.reshape(-1).abs()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
    return padded.amax(dim=1, keepdim=True).expand(-1, size).reshape(-1)[: len(flat)].view(values.shape)


def _measure_distance(values: Tensor, levels: Tensor) -> Tensor:
    """Return how far each value is from the nearest level."""
    ordered = levels.sort().values
    above = torch.searchsorted(ordered, values.contiguous()).clamp(1, len(ordered) - 1)
    return torch.minimum((values - ordered[above]).abs(), (values - ordered[above - 1]).abs())


def _bound_scale_error(packed: QuantizedWeight) -> float:
    """Return how far a scale may be from the one that the weight was quantized with."""
    nested = packed.parts.get(f"{packed.name}.nested_absmax")
    return 0.0 if nested is None else _NESTED_TOLERANCE * float(nested.max())


def _read_code_map(packed: QuantizedWeight) -> Tensor:
    """Return the value of each 4-bit code."""
    return packed.parts[f"{packed.name}.quant_map"].float()


def _read_quant_state(packed: QuantizedWeight) -> dict[str, Any]:
    name = f"{packed.name}.quant_state.bitsandbytes__{packed.kind}"
    state: dict[str, object] = json.loads(bytes(packed.parts[name].numpy()).decode()) if name in packed.parts else {}
    return state
