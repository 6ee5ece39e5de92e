"""Bases in 4 or 8 bits: what can be asked of bitsandbytes, and what is refused of any that was loaded.

A checkpoint that is quantised already says so in its config, and transformers loads it by whatever package made it.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import torch
from torch import nn

from lora_kit.errors import BaseModelError, format_list
from lora_kit.io.text import escape_text
from lora_kit.layers.dequantize import dequantize_four_bit

logger = logging.getLogger(__name__)

QUANTIZATIONS: Final = ("nf4", "nf4-double", "fp4", "fp4-double", "int8")
"""4 bits in one of two grids, their scales in fp32 or in 8 bits again (double quantisation); or 8 bits by rows."""
_CAST_WARNING: Final = "MatMul8bitLt: inputs will be cast"
_MISREAD_TOLERANCE: Final = 0.05
"""Distance of two ways to read one weight, by its largest number, that no rounding explains."""


def build_quantization_kwargs(kind: str | None, method: str | None, device: torch.device) -> dict[str, Any]:
    """What transformers is told besides: nothing for a base that is not to be quantised, and is not.

    Args:
        kind: one of `QUANTIZATIONS`. method: by which the checkpoint is quantised already.
    """
    if kind is None and method is None:
        return {}
    # Where nobody says, a quantised checkpoint goes to the first CUDA device, or with some methods to the CPU.
    placed: dict[str, Any] = {"device_map": {"": device}}
    if kind is not None:
        return {**placed, "quantization_config": _build_bnb_config(kind)}
    if method == "compressed-tensors":
        from transformers import CompressedTensorsConfig

        # Its package would do that in the first forward, and look for the weights inside our wrappers.
        logger.info("a checkpoint of compressed-tensors is trained on in 16 bits: its layers compute in no other form")
        return {**placed, "quantization_config": CompressedTensorsConfig(dequantize=True)}
    return placed


def _build_bnb_config(kind: str) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    grid, _, scales = kind.partition("-")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=grid,
        bnb_4bit_use_double_quant=scales == "double",
        # fp16 overflows in 4-bit training; bf16 does not.
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def quantization_method_of(config: Any) -> str | None:
    """The method that a checkpoint was quantised by, from its config; None for one that is not."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    if method is None and isinstance(found, dict) and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        method = "bitsandbytes"  # as it was written before methods had names
    return str(getattr(method, "value", method))


def refuse_already_quantized(name: str, config: Any, quantize: str | None) -> None:
    """Raise BaseModelError where a base is to be quantised that is quantised already."""
    method = quantization_method_of(config)
    if quantize is not None and method is not None:
        raise BaseModelError(
            f"{escape_text(name)} is quantised already, by {escape_text(method)}; quantize {quantize!r} was given",
            hint="leave quantize out, or give the base it was made from",
        )


def refuse_misread_weights(name: str, model: nn.Module) -> None:
    """Raise BaseModelError for a base whose 4-bit weights bitsandbytes itself reads wrong on this device.

    On a CPU, bitsandbytes 0.50 takes the wrong scales where a row is not a whole number of blocks (64 numbers), unless
    the rows are read as one. Such a model computes garbage, and an adapter that was trained on it does too elsewhere.
    """
    tried: dict[tuple[Any, ...], bool] = {}
    wrong: list[str] = []
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        state = getattr(weight, "quant_state", None)
        shape = tuple(getattr(state, "shape", ()))
        if state is None or len(shape) != 2 or shape[1] % state.blocksize == 0:
            continue
        key = (shape, state.blocksize, state.quant_type, state.nested)
        if key not in tried:
            tried[key] = _is_misread(weight, state)
        if tried[key]:
            wrong.append(f"{path} ({shape[1]} wide)")
    if wrong:
        raise BaseModelError(
            f"{escape_text(name)}: bitsandbytes reads 4-bit weights wrong here whose rows are no whole blocks of 64: "
            f"{format_list(wrong)}",
            hint="quantize: int8, or none, or another device",
        )


def silence_cast_warnings() -> None:
    """Keep bitsandbytes from saying in every layer of every forward that inputs are cast to fp16 for 8 bits."""
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_not_cast_warning)


def _is_not_cast_warning(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_CAST_WARNING)


def _is_misread(weight: Any, state: Any) -> bool:
    """Whether a weight is another one when it is read as a matrix than when it is read as one row."""
    from bitsandbytes.functional import dequantize_4bit

    expected = dequantize_four_bit(weight.data, state).float()
    found = dequantize_4bit(weight.data, state).float()
    return bool((found - expected).abs().max() > _MISREAD_TOLERANCE * expected.abs().max())
