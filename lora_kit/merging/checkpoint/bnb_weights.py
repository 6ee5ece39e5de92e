"""Weights that bitsandbytes quantized, as transformers stores them; read and written by blocks of rows.

A 4-bit weight is `<name>` (two codes in a byte, the first in the high half), `<name>.absmax` (one scale for each block
of codes; itself quantized to 8 bits where it is nested), `<name>.quant_map` (the value of each code), and the rest as
JSON in `<name>.quant_state.bitsandbytes__nf4`. An 8-bit weight is `<path>.weight` and a scale for each row,
`<path>.SCB`. The dequantized weight is `value of the code · scale`.
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
"""Characters by which one float in JSON may be longer than another."""


@dataclass(frozen=True)
class QuantizedWeight(ABC):
    """One quantized weight.

    Attributes:
        name: of its codes, which is the name of the weight in an unquantized checkpoint.
        parts: its stored tensors by name, mapped from their files.
        dtype: of the weight before it was quantized; a dequantized weight is written in it.
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
        """Blocks of rows must begin at a multiple of this."""

    @abstractmethod
    def __getitem__(self, rows: slice) -> Tensor:
        """Return some rows, dequantized: (n, in) fp32, not rounded to the dtype."""

    @abstractmethod
    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes of a block of rows, in the dtype they are stored in, and their fp32 scales."""

    @abstractmethod
    def read_codes(self, rows: slice) -> Tensor:
        """Return the stored codes of some rows, as bytes."""

    @abstractmethod
    def pack(self, blocks: Iterable[Tensor]) -> QuantizedWeight:
        """Return another weight, quantized as this one was and under its names.

        Args:
            blocks: the rows of the weight, in their order; the length of each but the last is a multiple of `step`.
        """

    def quantize_to_codes(self, rows: Tensor) -> Tensor:
        """Return the codes of a block of rows, as bytes."""
        return self.quantize(rows)[0].reshape(-1).view(torch.uint8)

    def sizes(self) -> dict[str, torch.Size]:
        """Return the shapes of the parts of a repacked weight, wide dtypes first."""
        return {
            name: self.parts[name].shape for name in sorted(self.parts, key=lambda name: -self.parts[name].itemsize)
        }

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    def to_meta(self) -> Tensor:
        """Return a meta tensor of the weight's shape and dtype."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class FourBitWeight(QuantizedWeight):
    """NF4 or FP4, in blocks of consecutive values."""

    @cached_property
    def _state(self) -> dict[str, Any]:
        """The quantization state, from its JSON."""
        state: dict[str, object] = json.loads(bytes(self.parts[self._state_name].numpy()).decode())
        return state

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
        """Whether the scales are quantized too."""
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
        return dequantize_four_bit(self.read_codes(rows).unsqueeze(1), state)

    def read_scales(self, begin: int, end: int) -> Tensor:
        """Return the scales of some blocks, fp32."""
        scales = self.parts[f"{self.name}.absmax"]
        if not self.nested:
            return scales[begin:end]
        from bitsandbytes.functional import dequantize_blockwise

        size = int(self._state["nested_blocksize"])
        first = begin // size
        whole: Tensor = dequantize_blockwise(
            scales[first * size : end].clone(),
            absmax=self.parts[f"{self.name}.nested_absmax"][first : -(-end // size)],
            code=self.parts[f"{self.name}.nested_quant_map"],
            blocksize=size,
        )
        # In fp32, as the offset was before it became text.
        return whole[begin - first * size :] + torch.tensor(self._state["nested_offset"], dtype=torch.float32)

    def read_codes(self, rows: slice) -> Tensor:
        data = self.parts[self.name].reshape(-1).view(torch.uint8)
        return data[rows.start * self.shape[1] // 2 : -(-rows.stop * self.shape[1] // 2)]

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(rows.to(self.dtype).contiguous(), blocksize=self._block, quant_type=self.kind)
        return codes.reshape(-1), state.absmax

    def pack(self, blocks: Iterable[Tensor]) -> FourBitWeight:
        codes, scales = torch.empty_like(self.parts[self.name]), []
        data, filled = codes.reshape(-1).view(torch.uint8), 0
        for block in blocks:
            own, absmax = self.quantize(block)
            data[filled : filled + len(own)] = own
            filled += len(own)
            scales.append(absmax)
        return FourBitWeight(
            self.name, {**self.parts, self.name: codes, **self._pack_scales(torch.cat(scales))}, self.dtype
        )

    def _pack_scales(self, absmax: Tensor) -> dict[str, Tensor]:
        """Return the parts that hold the scales."""
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
        """Bytes of the JSON of a repacked weight, padded with blanks, since its offset is not known in advance."""
        others = sum(part.nbytes for name, part in self.parts.items() if name != self._state_name)
        size = len(json.dumps({**self._state, "nested_offset": 0})) + _FLOAT_CHARACTERS
        return size + -(others + size) % _ALIGNMENT

    def sizes(self) -> dict[str, torch.Size]:
        return {**super().sizes(), **({self._state_name: torch.Size([self._state_size])} if self.nested else {})}


class EightBitWeight(QuantizedWeight):
    """int8 with a scale for each row, as LLM.int8() stores it."""

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

    def read_codes(self, rows: slice) -> Tensor:
        return self.parts[self.name][rows].reshape(-1).view(torch.uint8)

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        from bitsandbytes.functional import int8_vectorwise_quant

        # transformers rounds a weight to its own dtype first, then bitsandbytes rounds it to fp16.
        codes, scales, _ = int8_vectorwise_quant(rows.to(self.dtype).to(torch.float16).contiguous())
        return codes, scales

    def pack(self, blocks: Iterable[Tensor]) -> EightBitWeight:
        codes, scales = (torch.empty_like(self.parts[name]) for name in (self.name, self._scale))
        filled = 0
        for block in blocks:
            rows = slice(filled, filled + len(block))
            codes[rows], scales[rows] = self.quantize(block)
            filled = rows.stop
        return EightBitWeight(self.name, {**self.parts, self._scale: scales, self.name: codes}, self.dtype)


def find_quantized_weights(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, QuantizedWeight]:
    """Return the quantized weights among the tensors of a checkpoint, by name.

    Args:
        tensors: the checkpoint.
        dtype: of the model; 8-bit weights do not record theirs.

    Raises:
        BaseModelError: a weight is incomplete, or its parts contradict each other.
    """
    packed: dict[str, QuantizedWeight] = {}
    for name, tensor in tensors.items():
        stem, state, _ = name.partition(_STATE_MARK)
        if state:
            packed[stem] = _read_four_bit(stem, tensors)
        elif tensor.dtype == torch.int8 and name.endswith(".weight"):
            packed[name] = _read_eight_bit(name, tensors, dtype)
    return packed


def _read_four_bit(name: str, tensors: Mapping[str, Tensor]) -> FourBitWeight:
    own = {key: tensor for key, tensor in tensors.items() if key == name or key.startswith(f"{name}.")}
    packed = FourBitWeight(name, own, torch.float32)
    try:
        state = packed._state
        numel, block = math.prod(state["shape"]), int(state["blocksize"])
        blocks, expected = -(-numel // block), {name, packed._state_name, f"{name}.absmax", f"{name}.quant_map"}
        if packed.nested:
            expected |= {f"{name}.nested_absmax", f"{name}.nested_quant_map"}
        consistent = (
            own.keys() == expected
            and len(state["shape"]) == 2
            and own[name].nbytes == -(-numel // 2)
            and own[f"{name}.absmax"].numel() == blocks
            and own[f"{name}.quant_map"].numel() == 16
        )
        if not consistent:
            raise ValueError("its parts do not match each other")
        return FourBitWeight(name, own, _DTYPES[state["dtype"]])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _build_damage_error(name, error) from None


def _read_eight_bit(name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> EightBitWeight:
    path = name.removesuffix(".weight")
    names = (f"{path}.SCB", name, f"{path}.weight_format")
    own = {key: tensors[key] for key in names if key in tensors}
    scale, form = own.get(names[0]), own.get(names[2])
    if scale is None or own[name].ndim != 2 or scale.shape != own[name].shape[:1]:
        raise _build_damage_error(name, f"{names[0]} does not match it")
    if form is not None and int(form) != 0:
        raise _build_damage_error(name, "its rows are not stored in their order")
    return EightBitWeight(name, own, dtype)


def _build_damage_error(name: str, error: object) -> BaseModelError:
    return BaseModelError(f"the quantized weight {escape_text(name)} cannot be read: {escape_text(error)}")
