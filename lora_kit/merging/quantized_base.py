"""What becomes of a quantised base: three ways to merge into one, none of them chosen for anybody."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from lora_kit.errors import BaseMismatchError, BaseModelError, ConfigError, MergeError, listed
from lora_kit.io.text import printable
from lora_kit.layers.introspect import keeps_transposed
from lora_kit.merging.checkpoint.bnb_decode import whole_blocks
from lora_kit.merging.checkpoint.bnb_weights import Packed
from lora_kit.merging.checkpoint.meta_model import Head, Outline, outline, read_config
from lora_kit.merging.checkpoint.shards import Shard, read_shards, unpacked
from lora_kit.merging.preflight import quantisation
from lora_kit.targets.fingerprint import differences, fingerprint

ORIGINAL: Final = "original"
DEQUANTIZED: Final = "dequantized"
REQUANTIZED: Final = "requantized"
CHOICES: Final = (ORIGINAL, DEQUANTIZED, REQUANTIZED)
_METHOD: Final = "bitsandbytes"
_ROWS: Final = 16
_SAME: Final = 0.999
"""Share of the sampled codes that must be the same: where a number lies between two, machines round it differently."""


def check_choice(quantized: str | None, *, original: object, dtype: object, verify: str) -> None:
    """Raise ConfigError for arguments of a merge that contradict each other."""
    if quantized is not None and quantized not in CHOICES:
        raise ConfigError(f"quantized={quantized!r} was given; expected one of {listed(CHOICES)}")
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


def check_base(folder: Path, quantized: str | None) -> None:
    """Refuse a quantised base nothing was chosen for, and a choice for one that is not quantised.

    Raises:
        MergeError: saying what can be chosen. ConfigError: there is nothing to choose.
    """
    config = quantisation(folder / "config.json")
    if config is None and quantized is not None:
        raise ConfigError(f"quantized={quantized!r} was given, and {printable(folder)} is not quantised")
    if config is None:
        return
    if quantized is None:
        raise MergeError(
            f"{printable(folder)} is quantised: rounding to its grid would lose most of an adapter",
            hint="choose: quantized='original' merges into the unquantised base that you name; 'dequantized' into what "
            "the quantised weights stand for, written in 16 bits; 'requantized' quantises the result and says what is "
            "left; or load the adapter beside this base",
        )
    found = config.get("quant_method") if isinstance(config, dict) else config
    if found != _METHOD:
        raise MergeError(
            f"{printable(folder)} is quantised by {printable(found)}; {_METHOD} is the one that is read",
            hint="merge into the unquantised base, and quantise the result",
        )


def read_quantized(folder: Path, shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """The files of a quantised base, as those of one that is not.

    Raises:
        BaseModelError: none of its weights is quantised, or one is damaged.
    """
    dtype = getattr(read_config(folder, Head(None)), "dtype", None)
    found = unpacked(shards, dtype if isinstance(dtype, torch.dtype) else torch.float16)
    if not any(shard.packed for shard in found):
        raise BaseModelError(
            f"{printable(folder)}: its config speaks of quantisation, and its files hold no quantised weight",
            hint="take 'quantization_config' out of its config.json",
        )
    return found


def packed_by_key(model: Outline, shards: Sequence[Shard]) -> dict[str, Packed]:
    """The quantised weights of a model, by state dict key."""
    packed = {name: one for shard in shards for name, one in shard.packed.items()}
    return {key: packed[name] for key, name in model.names.items() if name in packed}


def check_original(folder: Path, original: Path, head: Head) -> None:
    """Raise BaseMismatchError unless a base was made by quantising another one.

    Rows of every quantised weight are quantised anew and give the bytes they have in the base; the weights that are not
    quantised are compared in samples.

    Args:
        folder: of the quantised base. head: of the model in both.
    """
    if quantisation(original / "config.json") is not None:
        raise BaseModelError(f"{printable(original)} is quantised too", hint="the original is the model before that")
    shards = read_quantized(folder, read_shards(folder))
    base, model = outline(folder, shards, head), outline(original, read_shards(original), head).model
    told = differences(fingerprint(base.model), model)
    if told:
        raise _other("; ".join(told))
    values = model.state_dict()
    packed = packed_by_key(base, shards)
    for key, one in packed.items():
        turned = keeps_transposed(model.get_submodule(key.rpartition(".")[0]))
        weight = values[key].T if turned else values[key]
        if weight.is_meta or weight.shape != one.shape:
            raise _other(f"it has no {key} of the shape {tuple(one.shape)}")
        rows = whole_blocks(one, _ROWS)
        if len(rows) % one.step:
            groups = [slice(0, len(rows))]
        else:
            groups = [slice(int(start), int(start) + one.step) for start in rows[:: one.step]]
        pairs = [(one.codes(weight[group]), one.codes_of(group)) for group in groups]
        same = sum(int((new == old).sum()) for new, old in pairs) / sum(len(old) for _, old in pairs)
        if same < _SAME:
            raise _other(f"quantising {key} of it gives {same:.1%} of the bytes that the quantised base has")


def _other(told: str) -> BaseMismatchError:
    return BaseMismatchError(
        f"the original is not the one that this base was quantised from: {told}",
        hint="give its own original, or merge with quantized='dequantized'",
    )
