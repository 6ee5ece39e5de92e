"""Proving a merge from what was written: it loads as the model it should be, and its numbers are base + adapter.

What is compared was read back by the safetensors library, and what it is compared with is computed in fp64 from the
adapter's own tensors, by state dict key: nothing of the plan, the fold or the writing is used.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from lora_kit.adapter.peft_keys import TokenEmbeddings
from lora_kit.errors import BaseModelError, MergeError, VerificationError, format_list
from lora_kit.layers.fold import Retention
from lora_kit.merging.checkpoint.bnb_decode import dequantize_rows
from lora_kit.merging.checkpoint.meta_model import MetaModel, TaskHead, build_meta_model
from lora_kit.merging.checkpoint.shards import Shard, group_quantized_weights, read_shards
from lora_kit.merging.new_token_rows import check_token_embeddings, collect_token_embeddings
from lora_kit.merging.planned_tensors import WeightedAdapter
from lora_kit.merging.quantized_base import collect_quantized_weights
from lora_kit.merging.verification.recompute import (
    COMPARED_ROWS,
    check_folded_weight,
    check_fused_weight,
    collect_expected_updates,
)

LEAST_RETAINED: Final = 0.5
"""Share of a tensor's delta that must survive rounding, unless its loss is allowed."""
_DELTAS_SHOWN: Final = 5


def check_retention(found: Sequence[Retention], *, dtype: str, allow: Collection[str]) -> None:
    """Raise MergeError where rounding has eaten most of a delta, with a table of the worst."""
    lost = sorted((one for one in found if one.retained < LEAST_RETAINED), key=lambda one: one.retained)
    if not lost or "lost-delta" in allow:
        return
    table = [
        f"{one.path}: {one.retained:.0%} of a delta {one.relative:.2g} of the weight" for one in lost[:_DELTAS_SHOWN]
    ]
    finer = "merge with dtype float32" if "float" in dtype else "merge into the original or the dequantised weights"
    head = f"less than {LEAST_RETAINED:.0%} of {len(lost)} of {len(found)} deltas survives rounding to {dtype}"
    raise MergeError(
        "\n  ".join([head, *table]),
        hint=f"{finer}, keep the adapter beside its base, or allow 'lost-delta'",
    )


def check_result(
    folder: Path, base: MetaModel, shards: Sequence[Shard], parts: Sequence[WeightedAdapter], *, head: TaskHead
) -> int:
    """Raise VerificationError unless a folder holds the base with these adapters folded in.

    Args:
        base: the base's outline. shards: its files.

    Returns:
        How many numbers were compared.
    """
    written = read_shards(folder)
    try:
        if any(shard.packed for shard in shards):
            written = group_quantized_weights(
                written, next(one.dtype for shard in shards for one in shard.packed.values())
            )
        merged = build_meta_model(folder, written, head)
    except BaseModelError as error:
        raise VerificationError(f"what was written does not load: {error.message}") from None
    sides = collect_expected_updates(base.model, parts)
    saved = {key: tensor for part in parts for key, tensor in part.adapter.saved().items()}
    pieces = {name for key in sides if key in base.converted for name, *_ in base.find_pieces(key) or ()}
    changed, rows = {*sides, *saved}, collect_token_embeddings(base, parts)
    _check_parameters(base, merged, changed)
    changed_names = pieces | {name for key, name in merged.names.items() if key in changed or key in rows}
    compared = _check_unchanged(base, merged, shards, written, changed_names)
    values = merged.values
    compared += sum(_check_sampled_equal(key, values[key], tensor) for key, tensor in saved.items())
    compared += sum(_check_embedding(key, merged, base, held) for key, held in sorted(rows.items()))
    packed, packed_now = collect_quantized_weights(base, shards), collect_quantized_weights(merged, written)
    own, found = (
        {name: tensor for shard in some for name, tensor in shard.tensors.items()} for some in (shards, written)
    )
    for key, several in sorted(sides.items()):
        if key in base.converted:
            compared += check_fused_weight(key, base, merged, several, own, found)
        else:
            compared += check_folded_weight(key, base, merged, several, packed, packed_now)
    return compared


def _check_parameters(base: MetaModel, merged: MetaModel, changed: Collection[str]) -> None:
    """Every parameter is there, and those that an adapter changes are their own."""
    absent = sorted({*merged.missing, *(base.names.keys() - merged.names.keys()), *(base.converted - merged.converted)})
    if absent:
        raise VerificationError(f"what was written has no {format_list(absent)}")
    if merged.unclaimed:
        raise VerificationError(f"what was written has tensors of no use: {format_list(merged.unclaimed)}")
    for key in sorted(changed):
        if len(merged.find_declared_ties(key)) > 1:
            told = " and ".join(merged.find_declared_ties(key))
            raise VerificationError(f"the merged model's config ties {told}, of which the adapter changes one")


def _check_unchanged(
    base: MetaModel, merged: MetaModel, shards: Sequence[Shard], written: Sequence[Shard], changed: Collection[str]
) -> int:
    """What no adapter changes has the base's numbers, sample by sample.

    Args:
        changed: names of the tensors that one does.
    """
    compared = 0
    places = {name: key for key, name in merged.names.items()}
    own = {name: tensor for shard in shards for name, tensor in shard.tensors.items()}
    packed, packed_now = ({n: one for shard in some for n, one in shard.packed.items()} for some in (shards, written))
    values = base.values
    for name, tensor in ((name, tensor) for shard in written for name, tensor in shard.tensors.items()):
        key = places.get(name)
        if name in changed:
            continue
        wanted = own.get(name, values.get(key or ""))
        if wanted is None or wanted.shape != tensor.shape or (name in packed_now and name not in packed):
            raise VerificationError(f"{name} was written and is not the base's")
        if name in packed_now:
            compared += sum(
                _check_sampled_equal(part, packed_now[name].parts[part], value)
                for part, value in packed[name].parts.items()
            )
        elif name in packed:
            rows = _pick_rows(tensor.shape[0])
            compared += _check_sampled_equal(name, tensor[rows], dequantize_rows(packed[name], rows))
        else:
            compared += _check_sampled_equal(name, tensor, wanted)
    return compared


def _check_embedding(key: str, merged: MetaModel, base: MetaModel, held: TokenEmbeddings) -> int:
    found, own = merged.values[key], base.values[key]
    return check_token_embeddings(key, found, own, held, _pick_rows(len(own)))


def _check_sampled_equal(name: str, found: Tensor, wanted: Tensor) -> int:
    rows, other = _sample_rows(found), _sample_rows(wanted).to(found.dtype)
    if not torch.equal(_view_bytes(rows), _view_bytes(other)):
        raise VerificationError(f"{name} was written with other numbers than it should have")
    return rows.numel()


def _view_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: NaN, which a base may hold, is not equal to itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _sample_rows(tensor: Tensor) -> Tensor:
    """Some rows of a tensor; all of a short one."""
    if tensor.ndim < 2:
        return tensor
    flat = tensor.flatten(0, -2)
    return flat[_pick_rows(flat.shape[0])]


def _pick_rows(count: int) -> Tensor:
    return torch.linspace(0, count - 1, min(COMPARED_ROWS, count), dtype=torch.float64).long()
