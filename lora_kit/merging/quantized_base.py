"""What becomes of a quantised base: three ways to merge into one, none of them chosen for anybody."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from lora_kit.errors import BaseMismatchError, BaseModelError, ConfigError, MergeError, format_list
from lora_kit.io.text import escape_text
from lora_kit.layers.introspect import is_stored_transposed
from lora_kit.merging.checkpoint.bnb_decode import pick_whole_blocks
from lora_kit.merging.checkpoint.bnb_weights import QuantizedWeight
from lora_kit.merging.checkpoint.meta_model import MetaModel, TaskHead, build_meta_model, read_config
from lora_kit.merging.checkpoint.shards import Shard, group_quantized_weights, read_shards
from lora_kit.merging.preflight import read_quantization_config
from lora_kit.targets.fingerprint import fingerprint, list_base_mismatches

ORIGINAL: Final = "original"
DEQUANTIZED: Final = "dequantized"
REQUANTIZED: Final = "requantized"
QUANTIZED_CHOICES: Final = (ORIGINAL, DEQUANTIZED, REQUANTIZED)
_QUANT_METHOD: Final = "bitsandbytes"
_SAMPLED_ROWS: Final = 16
_MIN_SAME_CODES: Final = 0.999
"""Share of the sampled codes that must be the same: where a number lies between two, machines round it differently."""


def check_quantized_choice(quantized: str | None, *, original: object, dtype: object, verify: str) -> None:
    """Raise ConfigError for arguments of a merge that contradict each other."""
    if quantized is not None and quantized not in QUANTIZED_CHOICES:
        raise ConfigError(f"quantized={quantized!r} was given; expected one of {format_list(QUANTIZED_CHOICES)}")
    if (quantized == ORIGINAL) != (original is not None):
        given = "no original" if original is None else f"an original, and quantized={quantized!r}"
        raise ConfigError(f"{given} was given", hint="the original comes with quantized='original', and only with it")
    if quantized == REQUANTIZED and dtype is not None:
        raise ConfigError("a dtype was given for weights that are to be quantised", hint="leave it out")
    if quantized in (DEQUANTIZED, REQUANTIZED) and verify == "logits":
        raise ConfigError(
            f"logits are not compared where the result is {quantized}",
            hint="a quantised base computes in a coarser dtype; compare the answers with 'lora-kit eval'",
        )


def check_quantized_base(folder: Path, quantized: str | None) -> None:
    """Refuse a quantised base nothing was chosen for, and a choice for one that is not quantised.

    Raises:
        MergeError: saying what can be chosen. ConfigError: there is nothing to choose.
    """
    config = read_quantization_config(folder / "config.json")
    if config is None and quantized is not None:
        raise ConfigError(f"quantized={quantized!r} was given, and {escape_text(folder)} is not quantised")
    if config is None:
        return
    if quantized is None:
        raise MergeError(
            f"{escape_text(folder)} is quantised: rounding to its grid would lose most of an adapter",
            hint="choose: quantized='original' merges into the unquantised base that you name; 'dequantized' into what "
            "the quantised weights stand for, written in 16 bits; 'requantized' quantises the result and says what is "
            "left; or load the adapter beside this base",
        )
    found = config.get("quant_method") if isinstance(config, dict) else config
    if found != _QUANT_METHOD:
        raise MergeError(
            f"{escape_text(folder)} is quantised by {escape_text(found)}; {_QUANT_METHOD} is the one that is read",
            hint="merge into the unquantised base, and quantise the result",
        )


def read_quantized_shards(folder: Path, shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """The files of a quantised base, as those of one that is not.

    Raises:
        BaseModelError: none of its weights is quantised, or one is damaged.
    """
    dtype = getattr(read_config(folder, TaskHead(None)), "dtype", None)
    found = group_quantized_weights(shards, dtype if isinstance(dtype, torch.dtype) else torch.float16)
    if not any(shard.packed for shard in found):
        raise BaseModelError(
            f"{escape_text(folder)}: its config speaks of quantisation, and its files hold no quantised weight",
            hint="take 'quantization_config' out of its config.json",
        )
    return found


def collect_quantized_weights(model: MetaModel, shards: Sequence[Shard]) -> dict[str, QuantizedWeight]:
    """The quantised weights of a model, by state dict key."""
    packed = {name: one for shard in shards for name, one in shard.packed.items()}
    return {key: packed[name] for key, name in model.names.items() if name in packed}


def check_original(folder: Path, original: Path, head: TaskHead) -> None:
    """Raise BaseMismatchError unless a base was made by quantising another one.

    Rows of every quantised weight are quantised anew and give the bytes they have in the base; the weights that are not
    quantised are compared in samples.

    Args:
        folder: of the quantised base. head: of the model in both.
    """
    if read_quantization_config(original / "config.json") is not None:
        raise BaseModelError(f"{escape_text(original)} is quantised too", hint="the original is the model before that")
    shards = read_quantized_shards(folder, read_shards(folder))
    base, model = build_meta_model(folder, shards, head), build_meta_model(original, read_shards(original), head).model
    told = list_base_mismatches(fingerprint(base.model), model)
    if told:
        raise _wrong_original_error("; ".join(told))
    values = model.state_dict()
    packed = collect_quantized_weights(base, shards)
    for key, one in packed.items():
        turned = is_stored_transposed(model.get_submodule(key.rpartition(".")[0]))
        weight = values[key].T if turned else values[key]
        if weight.is_meta or weight.shape != one.shape:
            raise _wrong_original_error(f"it has no {key} of the shape {tuple(one.shape)}")
        rows = pick_whole_blocks(one, _SAMPLED_ROWS)
        if len(rows) % one.step:
            groups = [slice(0, len(rows))]
        else:
            groups = [slice(int(start), int(start) + one.step) for start in rows[:: one.step]]
        pairs = [(one.quantize_to_codes(weight[group]), one.stored_codes_of(group)) for group in groups]
        same = sum(int((new == old).sum()) for new, old in pairs) / sum(len(old) for _, old in pairs)
        if same < _MIN_SAME_CODES:
            raise _wrong_original_error(
                f"quantising {key} of it gives {same:.1%} of the bytes that the quantised base has"
            )


def _wrong_original_error(told: str) -> BaseMismatchError:
    return BaseMismatchError(
        f"the original is not the one that this base was quantised from: {told}",
        hint="give its own original, or merge with quantized='dequantized'",
    )
