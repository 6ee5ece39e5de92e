"""Bases in 4 or 8 bits: options for bitsandbytes, and checks of bases that are quantized.

The config of a quantized checkpoint says so, and transformers loads it with the package that made it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from lora_kit.errors import BaseModelError, format_list
from lora_kit.io.text import escape_text
from lora_kit.layers.dequantize import dequantize_four_bit

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from transformers import BitsAndBytesConfig, PretrainedConfig

logger = logging.getLogger(__name__)

QUANTIZATIONS: Final = ("nf4", "nf4-double", "fp4", "fp4-double", "int8")
"""4 bits in one of two grids, with scales in fp32 or, for double quantization, in 8 bits; or 8 bits by rows."""
_CAST_WARNING: Final = "MatMul8bitLt: inputs will be cast"
_MISREAD_TOLERANCE: Final = 0.05
"""Difference of two readings of one weight, relative to its largest value. Rounding explains less than this."""


def build_quantization_kwargs(kind: str | None, method: str | None, device: torch.device) -> dict[str, Any]:
    """Return the extra arguments of `from_pretrained`: none for a base that neither is quantized nor is to be.

    Args:
        kind: one of `QUANTIZATIONS`, or None.
        method: by which the checkpoint is already quantized, or None.
        device: where the model is to be.
    """
    if kind is None and method is None:
        return {}
    # Without a device map, a quantized checkpoint goes to the first CUDA device, or with some methods to the CPU.
    placement: dict[str, Any] = {"device_map": {"": device}}
    if kind is not None:
        return {**placement, "quantization_config": _build_bnb_config(kind)}
    if method == "compressed-tensors":
        from transformers import CompressedTensorsConfig

        # Its package would dequantize in the first forward, and would look for the weights inside our wrappers.
        logger.info(
            "the compressed-tensors checkpoint is dequantized to 16 bits, since its layers compute in no other form"
        )
        return {**placement, "quantization_config": CompressedTensorsConfig(dequantize=True)}
    return placement


def _build_bnb_config(kind: str) -> BitsAndBytesConfig:
    """Return the config of bitsandbytes for one of `QUANTIZATIONS`."""
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


def quantization_method_of(config: PretrainedConfig) -> str | None:
    """Return the method by which a checkpoint is quantized, from its config; None where it is not quantized."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    if method is None and isinstance(settings, dict) and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"  # its configs from before methods had names
    return str(getattr(method, "value", method))


def refuse_already_quantized(name: str, config: PretrainedConfig, quantize: str | None) -> None:
    """Raise BaseModelError where a base is to be quantized that is already quantized."""
    method = quantization_method_of(config)
    if quantize is not None and method is not None:
        raise BaseModelError(
            f"{escape_text(name)} is already quantized, by {escape_text(method)}; quantize {quantize!r} was given",
            hint="leave quantize out, or give the unquantized base",
        )


def refuse_misread_weights(name: str, model: nn.Module) -> None:
    """Raise BaseModelError for a base whose 4-bit weights bitsandbytes itself reads wrong on this device.

    On a CPU, bitsandbytes 0.50 takes the wrong scales where a row is not a whole number of blocks (64 values), unless
    all rows are read as one. Such a model computes garbage, and an adapter trained on it computes garbage elsewhere.
    """
    is_misread: dict[tuple[object, ...], bool] = {}
    wrong: list[str] = []
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        state = getattr(weight, "quant_state", None)
        shape = tuple(getattr(state, "shape", ()))
        if state is None or len(shape) != 2 or shape[1] % state.blocksize == 0:
            continue
        key = (shape, state.blocksize, state.quant_type, state.nested)
        if key not in is_misread:
            is_misread[key] = _is_misread(weight, state)
        if is_misread[key]:
            wrong.append(f"{path} ({shape[1]} wide)")
    if wrong:
        raise BaseModelError(
            f"{escape_text(name)}: on this device bitsandbytes reads 4-bit weights wrong whose rows are not a multiple "
            f"of 64 wide: {format_list(wrong)}",
            hint="use quantize int8, an unquantized base, or another device",
        )


def silence_cast_warnings() -> None:
    """Keep bitsandbytes from warning, in every layer of every forward, that inputs are cast to fp16 for 8 bits."""
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_not_cast_warning)


def _is_not_cast_warning(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_CAST_WARNING)


def _is_misread(weight: Tensor, state: QuantState) -> bool:
    """Return whether a weight that is read as a matrix differs from the same weight read as one row."""
    from bitsandbytes.functional import dequantize_4bit

    expected = dequantize_four_bit(weight.data, state).float()
    found = dequantize_4bit(weight.data, state).float()
    return bool((found - expected).abs().max() > _MISREAD_TOLERANCE * expected.abs().max())
