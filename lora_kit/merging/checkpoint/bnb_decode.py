"""What quantised weights stand for, computed a second time: code by code, with nothing of bitsandbytes."""

from __future__ import annotations

import json
from typing import Any, Final

import torch
from torch import Tensor

from lora_kit.errors import VerificationError
from lora_kit.merging.checkpoint.bnb_weights import EightBitWeight, QuantizedWeight

_INT8_STEP: Final = 7.874015718698502e-3
"""1/127, in the digits that bitsandbytes multiplies with."""
_NESTED_TOLERANCE: Final = 0.0071
"""Share of its own scale by which a scale that is stored in 8 bits may be off."""
_NEAREST_TOLERANCE: Final = 1e-4
_MIN_NEAREST: Final = 0.99
"""Share of the numbers that must be stored as the very nearest; sums in another order round some to a neighbour."""


def dequantize_rows(packed: QuantizedWeight, rows: Tensor) -> Tensor:
    """Some rows of a quantised weight, in fp32.

    Args:
        rows: (n,) which they are.
    """
    codes, scales = _read_codes_and_scales(packed, rows)
    return codes * scales * _INT8_STEP if isinstance(packed, EightBitWeight) else _read_code_map(packed)[codes] * scales


def pick_whole_blocks(packed: QuantizedWeight, count: int) -> Tensor:
    """Rows, evenly spaced and about as many as asked for, that together make up whole blocks of numbers."""
    groups = max(packed.shape[0] // packed.step, 1)
    starts = torch.linspace(0, groups - 1, min(max(count // packed.step, 1), groups), dtype=torch.float64).long()
    rows = (starts.unsqueeze(1) * packed.step + torch.arange(packed.step)).reshape(-1)
    return rows[rows < packed.shape[0]]


def check_quantized(packed: QuantizedWeight, rows: Tensor, wanted: Tensor, *, exact: float = _MIN_NEAREST) -> None:
    """Raise VerificationError unless numbers are stored as the nearest that can be, at the scale they have.

    Args:
        rows: (n,) of `whole_blocks`. wanted: (n, in) what they should stand for: fp64.
        exact: share of them that must be the very nearest; the others may be what a neighbour before rounding to the
            dtype would have become.
    """
    codes, scales = _read_codes_and_scales(packed, rows)
    levels = torch.arange(-127, 128) * _INT8_STEP if isinstance(packed, EightBitWeight) else _read_code_map(packed)
    found = codes * _INT8_STEP if isinstance(packed, EightBitWeight) else levels[codes]
    rounded = wanted.to(packed.dtype).float()
    largest = _compute_block_maximum(
        rounded, packed.shape[1] if isinstance(packed, EightBitWeight) else _read_quant_state(packed)["blocksize"]
    )
    given = rounded / largest.clamp_min(torch.finfo(torch.float32).tiny)
    # Where all of a block is zero, so is what is stored, whatever its code.
    off = torch.where(largest > 0, (given - found).abs() - _measure_distance(given, levels), 0.0)
    unit = torch.finfo(packed.dtype).eps + torch.finfo(torch.float16).eps * isinstance(packed, EightBitWeight)
    nearest = float((off <= _NEAREST_TOLERANCE).float().mean())
    close = bool(((scales - largest).abs() <= unit * largest + _bound_scale_error(packed)).all())
    if nearest < exact or float(off.max()) > 2 * unit or not close:
        raise VerificationError(
            f"{packed.name} was written with other numbers than base + adapter are quantised to: {nearest:.1%} of "
            f"{codes.numel():,} are the nearest"
        )


def _read_codes_and_scales(packed: QuantizedWeight, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of some rows: (n, in) whole numbers, and (n, in) fp32 that they are multiplied with."""
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
    """Of every number, the largest one of its block."""
    flat = values.reshape(-1).abs()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
    return padded.amax(dim=1, keepdim=True).expand(-1, size).reshape(-1)[: len(flat)].view(values.shape)


def _measure_distance(given: Tensor, levels: Tensor) -> Tensor:
    """How far each number is from the nearest level."""
    ordered = levels.sort().values
    above = torch.searchsorted(ordered, given.contiguous()).clamp(1, len(ordered) - 1)
    return torch.minimum((given - ordered[above]).abs(), (given - ordered[above - 1]).abs())


def _bound_scale_error(packed: QuantizedWeight) -> float:
    """How far a scale may be from the one that was used."""
    nested = packed.parts.get(f"{packed.name}.nested_absmax")
    return 0.0 if nested is None else _NESTED_TOLERANCE * float(nested.max())


def _read_code_map(packed: QuantizedWeight) -> Tensor:
    """What the codes of 4 bits stand for."""
    return packed.parts[f"{packed.name}.quant_map"].float()


def _read_quant_state(packed: QuantizedWeight) -> dict[str, Any]:
    name = f"{packed.name}.quant_state.bitsandbytes__{packed.kind}"
    found: dict[str, Any] = json.loads(bytes(packed.parts[name].numpy()).decode()) if name in packed.parts else {}
    return found
