"""The three ways to merge into a quantized base; the caller must choose one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from lora_kit.errors import BaseMismatchError, BaseModelError, ConfigError, MergeError, format_list
from lora_kit.io.text import escape_text
from lora_kit.layers.introspect import is_stored_transposed
from lora_kit.merging.checkpoint.bnb_decode import pick_whole_blocks
from lora_kit.merging.checkpoint.bnb_weights import QuantizedWeight
from lora_kit.merging.checkpoint.meta_model import MetaModel, TaskHead, build_meta_model, read_config
from lora_kit.merging.checkpoint.shards import Shard, group_quantized_weights, read_shards
from lora_kit.merging.preflight import read_quantization_config
from lora_kit.targets.fingerprint import fingerprint, list_base_mismatches
from lora_kit.targets.match import named_layers

ORIGINAL: Final = "original"
DEQUANTIZED: Final = "dequantized"
REQUANTIZED: Final = "requantized"
QUANTIZED_CHOICES: Final = (ORIGINAL, DEQUANTIZED, REQUANTIZED)
_QUANT_METHOD: Final = "bitsandbytes"
_SAMPLED_ROWS: Final = 16
_MIN_SAME_CODES: Final = 0.999
"""Share of the sampled codes that must be equal: machines round a value halfway between two codes differently."""


def check_quantized_choice(quantized: str | None, *, original: object, dtype: object, verify: str) -> None:
    """Raise ConfigError for a choice that is invalid, or that contradicts the other arguments of a merge."""
    if quantized is not None and quantized not in QUANTIZED_CHOICES:
        raise ConfigError(f"quantized={quantized!r} was given; expected one of {format_list(QUANTIZED_CHOICES)}")
    if (quantized == ORIGINAL) != (original is not None):
        message = "no original" if original is None else f"an original, and quantized={quantized!r},"
        raise ConfigError(f"{message} was given", hint="quantized='original' and an original belong together")
    if quantized == REQUANTIZED and dtype is not None:
        raise ConfigError("a dtype was given for weights that are to be quantized", hint="leave the dtype out")
    if quantized in (DEQUANTIZED, REQUANTIZED) and verify == "logits":
        raise ConfigError(
            f"logits cannot be compared where the result is {quantized}: a quantized base computes in a coarser dtype",
            hint="compare the answers with 'lora-kit eval'",
        )


def check_quantized_base(folder: Path, quantized: str | None) -> None:
    """Check that a choice was made for a quantized base, and none for an unquantized one.

    Raises:
        MergeError: the base is quantized and nothing was chosen, or it was not quantized by bitsandbytes.
        ConfigError: something was chosen, and the base is not quantized.
    """
    config = read_quantization_config(folder / "config.json")
    if config is None and quantized is not None:
        raise ConfigError(f"quantized={quantized!r} was given, and {escape_text(folder)} is not quantized")
    if config is None:
        return
    if quantized is None:
        raise MergeError(
            f"{escape_text(folder)} is quantized: rounding to its grid would lose most of an adapter",
            hint="choose: quantized='original' merges into the unquantized base that you name; 'dequantized' into the "
            "dequantized weights, written in 16 bits; 'requantized' quantizes the result and reports what survives; "
            "or load the adapter beside this base",
        )
    method = config.get("quant_method") if isinstance(config, dict) else config
    if method != _QUANT_METHOD:
        raise MergeError(
            f"{escape_text(folder)} is quantized by {escape_text(method)}; only {_QUANT_METHOD} is supported",
            hint="merge into the unquantized base, and quantize the result",
        )


def read_quantized_shards(folder: Path, shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """Return the files of a quantized base as if it were unquantized; see `group_quantized_weights`.

    Raises:
        BaseModelError: none of its weights is quantized, or one is damaged.
    """
    dtype = getattr(read_config(folder, TaskHead(None)), "dtype", None)
    grouped = group_quantized_weights(shards, dtype if isinstance(dtype, torch.dtype) else torch.float16)
    if not any(shard.packed for shard in grouped):
        raise BaseModelError(
            f"{escape_text(folder)}: its config has a quantization_config, but its files hold no quantized weight",
            hint="remove 'quantization_config' from its config.json",
        )
    return grouped


def collect_quantized_weights(model: MetaModel, shards: Sequence[Shard]) -> dict[str, QuantizedWeight]:
    """Return the quantized weights of a model, by state dict key."""
    packed = {name: one for shard in shards for name, one in shard.packed.items()}
    return {key: packed[name] for key, name in model.names.items() if name in packed}


def check_original(folder: Path, original: Path, head: TaskHead) -> None:
    """Check that a base was made by quantizing another one.

    Some rows of every quantized weight are quantized again from the original and must give the bytes of the base;
    unquantized weights are compared in samples.

    Args:
        folder: of the quantized base.
        original: of the other one.
        head: task and labels of both.

    Raises:
        BaseMismatchError: it was not.
        BaseModelError: the original is quantized too.
    """
    if read_quantization_config(original / "config.json") is not None:
        raise BaseModelError(f"{escape_text(original)} is quantized too", hint="give the model before quantization")
    shards = read_quantized_shards(folder, read_shards(folder))
    base, model = build_meta_model(folder, shards, head), build_meta_model(original, read_shards(original), head).model
    mismatches = list_base_mismatches(fingerprint(base.model), list(named_layers(model)))
    if mismatches:
        raise _wrong_original_error("; ".join(mismatches))
    values = model.state_dict()
    for key, packed in collect_quantized_weights(base, shards).items():
        turned = is_stored_transposed(model.get_submodule(key.rpartition(".")[0]))
        weight = values[key].T if turned else values[key]
        if weight.is_meta or weight.shape != packed.shape:
            raise _wrong_original_error(f"it has no {key} of the shape {tuple(packed.shape)}")
        same = _measure_same_codes(packed, weight)
        if same < _MIN_SAME_CODES:
            raise _wrong_original_error(f"quantizing its {key} gives only {same:.1%} of the bytes of this base")


def _measure_same_codes(packed: QuantizedWeight, weight: Tensor) -> float:
    """Return the share of sampled codes that quantizing a weight (out, in) again gives."""
    rows = pick_whole_blocks(packed, _SAMPLED_ROWS)
    if len(rows) % packed.step:
        blocks = [slice(0, len(rows))]
    else:
        blocks = [slice(int(start), int(start) + packed.step) for start in rows[:: packed.step]]
    codes = [(packed.quantize_to_codes(weight[block]), packed.read_codes(block)) for block in blocks]
    return sum(int((new == old).sum()) for new, old in codes) / sum(len(old) for _, old in codes)


def _wrong_original_error(reason: str) -> BaseMismatchError:
    return BaseMismatchError(
        f"the original is not the one that this base was quantized from: {reason}",
        hint="give the base's own original, or merge with quantized='dequantized'",
    )
