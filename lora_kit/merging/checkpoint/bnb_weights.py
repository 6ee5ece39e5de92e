"""Weights that bitsandbytes quantised, as transformers stores them: read and packed again some rows at a time.

A 4-bit weight is `<name>` (two codes to a byte, the first in the high half), `<name>.absmax` (one scale to a block of
codes; itself quantised to 8 bits where it is nested), `<name>.quant_map` (what the codes stand for), and the rest as
JSON in `<name>.quant_state.bitsandbytes__nf4`. An 8-bit weight is `<path>.weight` and a scale to each row,
`<path>.SCB`. What they stand for is `code · scale`.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from lora_kit.errors import BaseModelError
from lora_kit.io.text import escape_text
from lora_kit.layers.dequantize import dequantize_four_bit, dequantize_int8

_STATE_MARK: Final = ".quant_state.bitsandbytes__"
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ALIGNMENT: Final = 8
_FLOAT_CHARACTERS: Final = 25
"""Characters that a float may take more in JSON than another."""


@dataclass(frozen=True)
class QuantizedWeight(ABC):
    """One quantised weight.

    Attributes:
        name: of its codes; in a checkpoint that is not quantised, of the weight.
        parts: its tensors by their names, mapped from their files.
        dtype: of the weight that was quantised, which it is written in again.
    """

    name: str
    parts: Mapping[str, Tensor]
    dtype: torch.dtype

    @property
    @abstractmethod
    def kind(self) -> str:
        """`nf4`, `fp4` or `int8`."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """(out, in) of the weight."""

    @property
    @abstractmethod
    def step(self) -> int:
        """Rows that are read and packed begin at a multiple of this."""

    @abstractmethod
    def __getitem__(self, rows: slice) -> Tensor:
        """Some rows of the weight: fp32, not rounded to its dtype."""

    @abstractmethod
    def quantize_to_codes(self, tensor: Tensor) -> Tensor:
        """What rows are packed to, as bytes; they begin at a multiple of `step`."""

    @abstractmethod
    def stored_codes_of(self, rows: slice) -> Tensor:
        """What rows were packed to, as bytes."""

    @abstractmethod
    def pack(self, blocks: Iterable[Tensor]) -> QuantizedWeight:
        """Another weight in its place, packed as this one was.

        Args:
            blocks: the rows of the weight, in their order; each but the last is a multiple of `step` long.
        """

    def sizes(self) -> dict[str, torch.Size]:
        """Shapes of the parts as they are when it is packed again, wide ones first."""
        return {
            name: self.parts[name].shape for name in sorted(self.parts, key=lambda name: -self.parts[name].itemsize)
        }

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    def to_meta(self) -> Tensor:
        """A tensor of the weight's shape and dtype without numbers."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class FourBitWeight(QuantizedWeight):
    """NF4 or FP4, in blocks of consecutive numbers."""

    @cached_property
    def _state(self) -> dict[str, Any]:
        """What the JSON says."""
        text = bytes(self.parts[self._state_name].numpy())
        found: dict[str, Any] = json.loads(text.decode())
        return found

    @cached_property
    def _state_name(self) -> str:
        return next(name for name in self.parts if name.startswith(f"{self.name}{_STATE_MARK}"))

    @property
    def kind(self) -> str:
        return self._state_name.removeprefix(f"{self.name}{_STATE_MARK}")

    @cached_property
    def shape(self) -> torch.Size:
        return torch.Size(self._state["shape"])

    @property
    def step(self) -> int:
        return int(self._block // math.gcd(self._block, self.shape[1]))

    @property
    def _block(self) -> int:
        return int(self._state["blocksize"])

    @property
    def nested(self) -> bool:
        """Whether the scales are quantised too."""
        return "nested_offset" in self._state

    def __getitem__(self, rows: slice) -> Tensor:
        from bitsandbytes.functional import QuantState

        begin, end = rows.start * self.shape[1], rows.stop * self.shape[1]
        state = QuantState(
            absmax=self.read_scales(begin // self._block, -(-end // self._block)),
            shape=torch.Size([rows.stop - rows.start, self.shape[1]]),
            code=self.parts[f"{self.name}.quant_map"],
            blocksize=self._block,
            quant_type=self.kind,
            dtype=torch.float32,
        )
        return dequantize_four_bit(self.stored_codes_of(rows).unsqueeze(1), state)

    def read_scales(self, begin: int, end: int) -> Tensor:
        """The scales of some blocks: fp32."""
        found = self.parts[f"{self.name}.absmax"]
        if not self.nested:
            return found[begin:end]
        from bitsandbytes.functional import dequantize_blockwise

        size = int(self._state["nested_blocksize"])
        first = begin // size
        whole: Tensor = dequantize_blockwise(
            found[first * size : end].clone(),
            absmax=self.parts[f"{self.name}.nested_absmax"][first : -(-end // size)],
            code=self.parts[f"{self.name}.nested_quant_map"],
            blocksize=size,
        )
        # As a number of fp32, which it was before it became text.
        return whole[begin - first * size :] + torch.tensor(self._state["nested_offset"], dtype=torch.float32)

    def quantize_to_codes(self, tensor: Tensor) -> Tensor:
        return self._quantize(tensor)[0]

    def stored_codes_of(self, rows: slice) -> Tensor:
        data = self.parts[self.name].reshape(-1).view(torch.uint8)
        return data[rows.start * self.shape[1] // 2 : -(-rows.stop * self.shape[1] // 2)]

    def _quantize(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(tensor.to(self.dtype).contiguous(), blocksize=self._block, quant_type=self.kind)
        return codes.reshape(-1), state.absmax

    def pack(self, blocks: Iterable[Tensor]) -> FourBitWeight:
        codes, scales = torch.empty_like(self.parts[self.name]), []
        data, filled = codes.reshape(-1).view(torch.uint8), 0
        for block in blocks:
            packed, absmax = self._quantize(block)
            data[filled : filled + len(packed)] = packed
            filled += len(packed)
            scales.append(absmax)
        return FourBitWeight(
            self.name, {**self.parts, self.name: codes, **self._pack_scales(torch.cat(scales))}, self.dtype
        )

    def _pack_scales(self, absmax: Tensor) -> dict[str, Tensor]:
        """The parts that hold the scales."""
        if not self.nested:
            return {f"{self.name}.absmax": absmax}
        from bitsandbytes.functional import quantize_blockwise

        offset = absmax.mean()
        code, size = self.parts[f"{self.name}.nested_quant_map"], int(self._state["nested_blocksize"])
        quantized, state = quantize_blockwise(absmax - offset, code=code, blocksize=size)
        text = json.dumps({**self._state, "nested_offset": offset.item()}).encode().ljust(self._state_size)
        return {
            f"{self.name}.absmax": quantized,
            f"{self.name}.nested_absmax": state.absmax,
            self._state_name: torch.frombuffer(bytearray(text), dtype=torch.uint8),
        }

    @property
    def _state_size(self) -> int:
        """Bytes of the JSON when it is written again: it holds a number that is not known before, so blanks follow."""
        others = sum(part.nbytes for name, part in self.parts.items() if name != self._state_name)
        size = len(json.dumps({**self._state, "nested_offset": 0})) + _FLOAT_CHARACTERS
        return size + -(others + size) % _ALIGNMENT

    def sizes(self) -> dict[str, torch.Size]:
        return {**super().sizes(), **({self._state_name: torch.Size([self._state_size])} if self.nested else {})}


class EightBitWeight(QuantizedWeight):
    """int8 by rows, as LLM.int8() does."""

    @property
    def kind(self) -> str:
        return "int8"

    @property
    def shape(self) -> torch.Size:
        return self.parts[self.name].shape

    @property
    def step(self) -> int:
        return 1

    @property
    def _scale(self) -> str:
        return f"{self.name.removesuffix('.weight')}.SCB"

    def __getitem__(self, rows: slice) -> Tensor:
        return dequantize_int8(self.parts[self.name][rows], self.parts[self._scale][rows])

    def quantize_to_codes(self, tensor: Tensor) -> Tensor:
        return self._quantize(tensor)[0].reshape(-1).view(torch.uint8)

    def stored_codes_of(self, rows: slice) -> Tensor:
        return self.parts[self.name][rows].reshape(-1).view(torch.uint8)

    def _quantize(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        from bitsandbytes.functional import int8_vectorwise_quant

        # transformers rounds a weight to its own dtype before, and bitsandbytes to fp16.
        codes, scales, _ = int8_vectorwise_quant(tensor.to(self.dtype).to(torch.float16).contiguous())
        return codes, scales

    def pack(self, blocks: Iterable[Tensor]) -> EightBitWeight:
        codes, scales = (torch.empty_like(self.parts[name]) for name in (self.name, self._scale))
        filled = 0
        for block in blocks:
            rows = slice(filled, filled + len(block))
            codes[rows], scales[rows] = self._quantize(block)
            filled = rows.stop
        return EightBitWeight(self.name, {**self.parts, self._scale: scales, self.name: codes}, self.dtype)


def find_quantized_weights(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, QuantizedWeight]:
    """The quantised weights among the tensors of a checkpoint, by their names.

    Args:
        dtype: of the model; 8-bit weights do not say what they were.

    Raises:
        BaseModelError: one is not whole, or not as it says.
    """
    found: dict[str, QuantizedWeight] = {}
    for name, tensor in tensors.items():
        stem, state, _ = name.partition(_STATE_MARK)
        if state:
            found[stem] = _read_four_bit(stem, tensors)
        elif tensor.dtype == torch.int8 and name.endswith(".weight"):
            found[name] = _read_eight_bit(name, tensors, dtype)
    return found


def _read_four_bit(name: str, tensors: Mapping[str, Tensor]) -> FourBitWeight:
    own = {key: tensor for key, tensor in tensors.items() if key == name or key.startswith(f"{name}.")}
    packed = FourBitWeight(name, own, torch.float32)
    try:
        state = packed._state
        numel, block = math.prod(state["shape"]), int(state["blocksize"])
        blocks, wanted = -(-numel // block), {name, packed._state_name, f"{name}.absmax", f"{name}.quant_map"}
        if packed.nested:
            wanted |= {f"{name}.nested_absmax", f"{name}.nested_quant_map"}
        whole = (
            own.keys() == wanted
            and len(state["shape"]) == 2
            and own[name].nbytes == -(-numel // 2)
            and own[f"{name}.absmax"].numel() == blocks
            and own[f"{name}.quant_map"].numel() == 16
        )
        if not whole:
            raise ValueError("its parts do not fit each other")
        return FourBitWeight(name, own, _DTYPES[state["dtype"]])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged_error(name, error) from None


def _read_eight_bit(name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> EightBitWeight:
    path = name.removesuffix(".weight")
    names = (f"{path}.SCB", name, f"{path}.weight_format")
    own = {key: tensors[key] for key in names if key in tensors}
    scale, form = own.get(names[0]), own.get(names[2])
    if scale is None or own[name].ndim != 2 or scale.shape != own[name].shape[:1]:
        raise _damaged_error(name, f"{names[0]} does not fit it")
    if form is not None and int(form) != 0:
        raise _damaged_error(name, "its rows are not stored in their order")
    return EightBitWeight(name, own, dtype)


def _damaged_error(name: str, error: object) -> BaseModelError:
    return BaseModelError(f"the quantised weight {escape_text(name)} cannot be read: {escape_text(error)}")
