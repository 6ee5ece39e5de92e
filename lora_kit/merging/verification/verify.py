"""Proving a merge from what was written: it loads as the expected model, and its values are base + adapter.

The safetensors library reads the result back. The expected values are computed in fp64 from the adapter's own tensors,
by state dict key; nothing of the plan, the fold or the writing is used.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from torch import Tensor

from lora_kit.errors import BaseModelError, MergeError, VerificationError, format_list
from lora_kit.layers.fold import Retention
from lora_kit.merging.checkpoint.bnb_decode import dequantize_rows
from lora_kit.merging.checkpoint.meta_model import MetaModel, TaskHead, build_meta_model
from lora_kit.merging.checkpoint.shards import Shard, group_quantized_weights, read_shards
from lora_kit.merging.new_token_rows import check_token_embeddings, collect_token_embeddings, has_same_bytes
from lora_kit.merging.planned_tensors import WeightedAdapter
from lora_kit.merging.quantized_base import collect_quantized_weights
from lora_kit.merging.verification.recompute import (
    check_folded_weight,
    check_fused_weight,
    collect_expected_updates,
    pick_rows,
)

LEAST_RETAINED: Final = 0.5
"""Share of a tensor's delta that must survive rounding, unless its loss is allowed."""
LARGEST_RELATIVE: Final = 1e4
"""The largest delta, beside its weight, that is merged without being allowed; trained ones are below 1."""
_DELTAS_SHOWN: Final = 5


def check_retention(tensors: Sequence[Retention], *, dtype: str, allow: Collection[str]) -> None:
    """Raise MergeError, with a table of the worst, where rounding lost most of a delta or one buries its weight."""
    _check_sizes(tensors, allow)
    lost = sorted((one for one in tensors if one.retained < LEAST_RETAINED), key=lambda one: one.retained)
    if not lost or "lost-delta" in allow:
        return
    table = [
        f"{one.path}: {one.retained:.0%} of a delta {one.relative:.2g} of the weight" for one in lost[:_DELTAS_SHOWN]
    ]
    is_plain = "float" in dtype
    finer = "merge with --dtype float32" if is_plain else "merge into the original or the dequantized weights"
    message = f"less than {LEAST_RETAINED:.0%} of {len(lost)} of {len(tensors)} deltas survives rounding to {dtype}"
    hint = f"{finer}, keep the adapter beside its base, or allow 'lost-delta'"
    raise MergeError("\n  ".join([message, *table]), hint=hint)


def _check_sizes(tensors: Sequence[Retention], allow: Collection[str]) -> None:
    """Raise MergeError for a delta beside which nothing of a weight is left. A weight of zeros has nothing to bury."""
    huge = [one for one in tensors if LARGEST_RELATIVE < one.relative < math.inf]
    if not huge or "huge-delta" in allow:
        return
    worst = max(huge, key=lambda one: one.relative)
    message = f"{worst.path}: the delta is {worst.relative:.2g} times its weight, of which nothing would be left"
    raise MergeError(message, hint="is it the right adapter, and its lora_alpha? allow 'huge-delta' to go on")


def check_result(
    folder: Path, base: MetaModel, shards: Sequence[Shard], adapters: Sequence[WeightedAdapter], *, head: TaskHead
) -> int:
    """Check that a folder holds the base with these adapters folded in.

    Args:
        folder: that was written.
        base: meta model of the base.
        shards: files of the base.
        adapters: that were merged.
        head: of the merged model.

    Returns:
        How many values were compared.

    Raises:
        VerificationError: it does not.
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
    updates = collect_expected_updates(base.model, adapters)
    saved = {key: tensor for weighted in adapters for key, tensor in weighted.adapter.saved().items()}
    pieces = {name for key in updates if key in base.converted for name, *_ in base.find_pieces(key) or ()}
    changed, embeddings = {*updates, *saved}, collect_token_embeddings(base, adapters)
    _check_parameters(base, merged, changed)
    changed_names = pieces | {name for key, name in merged.names.items() if key in changed or key in embeddings}
    compared = _check_unchanged(base, merged, shards, written, changed_names)
    compared += sum(_check_sampled_equal(key, merged.values[key], tensor) for key, tensor in saved.items())
    for key, rows in sorted(embeddings.items()):
        own = base.values[key]
        compared += check_token_embeddings(key, merged.values[key], own, rows, pick_rows(len(own)))
    packed, packed_now = collect_quantized_weights(base, shards), collect_quantized_weights(merged, written)
    for key, several in sorted(updates.items()):
        if key in base.converted:
            compared += check_fused_weight(key, base, merged, several, _tensors_of(shards), _tensors_of(written))
        else:
            compared += check_folded_weight(key, base, merged, several, packed, packed_now)
    return compared


def _tensors_of(shards: Sequence[Shard]) -> dict[str, Tensor]:
    return {name: tensor for shard in shards for name, tensor in shard.tensors.items()}


def _check_parameters(base: MetaModel, merged: MetaModel, changed: Collection[str]) -> None:
    """Raise VerificationError unless every parameter is there, and those that an adapter changes are not tied."""
    absent = sorted({*merged.missing, *(base.names.keys() - merged.names.keys()), *(base.converted - merged.converted)})
    if absent:
        raise VerificationError(f"what was written has no {format_list(absent)}")
    if merged.unclaimed:
        raise VerificationError(f"what was written has tensors of no use: {format_list(merged.unclaimed)}")
    for key in sorted(changed):
        if len(merged.find_declared_ties(key)) > 1:
            tied = " and ".join(merged.find_declared_ties(key))
            raise VerificationError(f"the merged model's config ties {tied}, of which the adapter changes one")


def _check_unchanged(
    base: MetaModel, merged: MetaModel, shards: Sequence[Shard], written: Sequence[Shard], changed: Collection[str]
) -> int:
    """Compare samples of every tensor that no adapter changes with the base. Returns how many values were compared.

    Args:
        base: meta model of the base.
        merged: meta model of the result.
        shards: files of the base.
        written: files of the result.
        changed: names of the tensors that an adapter changes.

    Raises:
        VerificationError: one differs, or is not the base's.
    """
    compared = 0
    keys, own = {name: key for key, name in merged.names.items()}, _tensors_of(shards)
    packed, packed_now = ({n: one for shard in some for n, one in shard.packed.items()} for some in (shards, written))
    for name, tensor in _tensors_of(written).items():
        if name in changed:
            continue
        expected = own.get(name, base.values.get(keys.get(name, "")))
        if expected is None or expected.shape != tensor.shape or (name in packed_now and name not in packed):
            raise VerificationError(f"{name} was written and is not the base's")
        if name in packed_now:
            compared += sum(
                _check_sampled_equal(part, packed_now[name].parts[part], value)
                for part, value in packed[name].parts.items()
            )
        elif name in packed:
            rows = pick_rows(tensor.shape[0])
            compared += _check_sampled_equal(name, tensor[rows], dequantize_rows(packed[name], rows))
        else:
            compared += _check_sampled_equal(name, tensor, expected)
    return compared


def _check_sampled_equal(name: str, written: Tensor, expected: Tensor) -> int:
    """Compare samples of two tensors. Returns how many values were compared."""
    rows, other = _sample_rows(written), _sample_rows(expected).to(written.dtype)
    if not has_same_bytes(rows, other):
        raise VerificationError(f"{name} was written with other numbers than it should have")
    return rows.numel()


def _sample_rows(tensor: Tensor) -> Tensor:
    """Return some rows of a tensor; all of a vector."""
    if tensor.ndim < 2:
        return tensor
    flat = tensor.flatten(0, -2)
    return flat[pick_rows(flat.shape[0])]
