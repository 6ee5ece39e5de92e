"""What every tensor of the merged model is made of, proved before anything is written.

Everything an adapter holds goes into exactly one tensor of the result; what has no place is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from lora_kit.adapter.peft_keys import LoraWeights
from lora_kit.errors import BaseModelError, MergeError, format_list
from lora_kit.layers.introspect import is_stored_transposed
from lora_kit.layers.parameter import is_transposed
from lora_kit.merging.checkpoint.bnb_weights import QuantizedWeight
from lora_kit.merging.checkpoint.meta_model import MetaModel, TaskHead, build_empty_model
from lora_kit.merging.checkpoint.shards import Shard
from lora_kit.merging.new_token_rows import TokenEmbeddingsByKey, add_token_embeddings, has_equal_rows
from lora_kit.merging.planned_tensors import MergePlan, PlannedTensor, WeightedAdapter, WeightUpdate
from lora_kit.targets.compatibility import match_adapter
from lora_kit.targets.coverage import LayerTarget

_FOLDABLE_DTYPES: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class _AdapterChanges:
    """What adapters do to a model, by state dict key; emptied as it finds its place.

    Attributes:
        parts: the same by name in the base's files, where a parameter is several tensors there.
        rows: that take the places of a table's own.
    """

    updates: dict[str, list[WeightUpdate]] = field(default_factory=dict)
    parts: dict[str, list[WeightUpdate]] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    rows: TokenEmbeddingsByKey = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        return sorted({*self.updates, *self.parts, *self.values, *self.rows})


def plan_merge(
    base: MetaModel,
    shards: Sequence[Shard],
    parts: Sequence[WeightedAdapter],
    *,
    head: TaskHead,
    dtype: torch.dtype | None,
    allow: Collection[str],
    quantized: str | None = None,
) -> MergePlan:
    """Give everything the adapters hold its place.

    Args:
        dtype: of the floating tensors of the result; None: each keeps its own.
        quantized: as in `merge`.
        allow: as in `merge`.

    Raises:
        AdapterError, BaseMismatchError: an adapter does not fit the base.
        MergeError: something has no place, or its place is shared or of a kind that nothing can be folded into.
        BaseModelError: the base does not fill its own model.
    """
    changes = _collect_changes(base, parts, allow)
    _split_fused_updates(base, changes)
    _check_base(base, head, changes)
    untied = _find_untied_keys(base, head, changes, allow)
    own = {name: key for key, name in base.names.items()}
    left_out = set(base.unclaimed)
    entries = {
        shard.name: [
            entry
            for name, tensor in shard.tensors.items()
            if name not in left_out
            for entry in _apply_quantized_choice(
                _plan_tensor(base, name, shard.packed.get(name, tensor), own.get(name), changes, dtype),
                base,
                own.get(name, ""),
                quantized,
            )
        ]
        for shard in shards
    }
    last = entries[shards[-1].name]
    last += [_plan_untied_tensor(base, key, changes, dtype) for key in untied if key not in base.names]
    last += _plan_added_tensors(base, changes, dtype or _find_usual_dtype(shards))
    if changes.keys:
        raise MergeError(f"nothing in the base's files is {format_list(changes.keys)}, which the adapter changes")
    # Wide tensors first, as safetensors aligns them; within a width the base's own order.
    ordered = {name: tuple(sorted(found, key=_width_of, reverse=True)) for name, found in entries.items()}
    # A file that held nothing but parts of other files' weights has nothing left to hold.
    filled = tuple((shard, ordered[shard.name]) for shard in shards if ordered[shard.name])
    return MergePlan(filled, untied, tuple(sorted(left_out)))


def _collect_changes(base: MetaModel, parts: Sequence[WeightedAdapter], allow: Collection[str]) -> _AdapterChanges:
    changes = _AdapterChanges()
    for name, adapter, weight in parts:
        coverage = match_adapter(name, adapter, base.model, dtype=torch.float32, allow=allow)
        add_token_embeddings(changes.rows, WeightedAdapter(name, adapter, weight), coverage)
        alone = weight == 1 and len(parts) == 1
        if not alone and adapter.config.use_dora:
            raise MergeError(f"{name!r} is a DoRA, which scales the whole weight", hint="merge it alone, with weight 1")
        if weight != 1 and coverage.saved:
            raise MergeError(
                f"{name!r} replaces {format_list(coverage.saved)}, which cannot be weighted", hint="weight 1"
            )
        for target in coverage.targets:
            key = target.path if target.kind == "parameter" else f"{target.path}.weight"
            changes.updates.setdefault(key, []).extend(_build_updates(adapter.all_pairs()[target.key], target, weight))
        for key, tensor in adapter.saved().items():
            if key in changes.values:
                raise MergeError(f"two of the adapters replace {key}", hint="merge them one after the other")
            changes.values[key] = tensor
    both = sorted((changes.updates.keys() | changes.rows.keys()) & changes.values.keys())
    both += sorted(changes.rows.keys() & changes.updates.keys())
    if both:
        raise MergeError(f"one adapter replaces what another changes: {format_list(both)}")
    return changes


def _build_updates(pair: LoraWeights, target: LayerTarget, weight: float) -> list[WeightUpdate]:
    """What a pair adds, matrix by matrix."""
    scaling = target.scaling * weight
    if pair.kind == "convolution":
        return [WeightUpdate(LoraWeights(pair.a.flatten(1), pair.b.flatten(1), pair.kind), scaling)]
    if pair.kind != "parameter":
        return [WeightUpdate(pair, scaling)]
    each = pair.split_by_expert(target.rank)
    return [WeightUpdate(LoraWeights(a, b, pair.kind), scaling, number) for number, (a, b) in enumerate(each)]


def _split_fused_updates(base: MetaModel, changes: _AdapterChanges) -> None:
    """Of a parameter that the files hold as several tensors, give each its share of what is added."""
    for key in [key for key in changes.updates if key in base.converted]:
        pieces = base.find_pieces(key)
        if pieces is None:
            raise MergeError(
                f"the base's files hold {key} in another form, which nothing is folded into",
                hint="save the base with transformers in the form it has in memory",
            )
        updates = changes.updates.pop(key)
        for piece in pieces:
            own = [update.rows(piece.begin, piece.end) for update in updates if update.expert == piece.expert]
            changes.parts[piece.name] = own


def _check_base(base: MetaModel, head: TaskHead, changes: _AdapterChanges) -> None:
    missing = [key for key in base.missing if key not in changes.values]
    if missing:
        hint = "a new head must come with the adapter" if head.fields else "the base is not whole"
        raise BaseModelError(f"nothing in the base's files fills {format_list(missing)}", hint=hint)
    # A model with another head than the base's own has no place for that one's tensors.
    same = type(base.model).__name__ in (getattr(base.config, "architectures", None) or ())
    if base.unclaimed and (same or not head.fields):
        raise BaseModelError(
            f"{type(base.model).__name__} has no place for {format_list(base.unclaimed)} of the base's files"
        )
    converted = [key for key in changes.keys if key in base.converted]
    if converted:
        raise MergeError(
            f"the base's files hold {format_list(converted)} in another form, which nothing is folded into",
            hint="save the base with transformers in the form it has in memory",
        )


def _find_untied_keys(
    base: MetaModel, head: TaskHead, changes: _AdapterChanges, allow: Collection[str]
) -> tuple[str, ...]:
    """Keys that must be parameters of their own, since an adapter changes one and not the other."""
    groups = {base.find_declared_ties(key) for key in changes.keys}
    for group in [group for group in groups if len(group) > 1 and has_equal_rows(changes.rows, group)]:
        groups.remove(group)
        for key in group:
            if key not in base.names:  # what it is tied to has them
                del changes.rows[key]
    keys = tuple(key for group in sorted(groups) if len(group) > 1 for key in group)
    # What the files hold apart is loaded apart, whatever the config says of it.
    shared = [key for key in keys if len(base.find_tied_keys(key)) > 1]
    if shared and "untie" not in allow:
        raise MergeError(
            f"the adapter changes a weight that is shared: {' and '.join(shared)} are one parameter",
            hint="allow 'untie' to write each of them, and a config that no longer ties them",
        )
    if not keys:
        return ()
    apart = {
        id(tensor) for key, tensor in build_untied_model(base, head).state_dict(keep_vars=True).items() if key in keys
    }
    if len(apart) < len(keys):
        raise MergeError(f"{' and '.join(keys)} are one parameter in every model of this kind, and cannot be untied")
    return keys


def build_untied_model(base: MetaModel, head: TaskHead) -> Any:
    """The base's model without weights, its config saying that nothing is tied."""
    config = type(base.config).from_dict({**base.config.to_dict(), "tie_word_embeddings": False})
    return build_empty_model(config, head)


def _width_of(entry: PlannedTensor) -> int:
    """Bytes of a number; what is quantised again has several kinds and comes before all others, wide ones first."""
    return 2**10 if entry.how == "requantized" else entry.dtype.itemsize


def _apply_quantized_choice(
    entry: PlannedTensor, base: MetaModel, key: str, quantized: str | None
) -> list[PlannedTensor]:
    """What becomes of a tensor that may be a quantised weight."""
    source = entry.source
    if not isinstance(source, QuantizedWeight):
        return [entry]
    if quantized != "requantized":
        if is_stored_transposed(base.model.get_submodule(key.rpartition(".")[0])):
            raise MergeError(
                f"{entry.name} is a quantised Conv1D, which is not written dequantised",
                hint="merge into the original, or requantise",
            )
        return [entry]
    if entry.updates:
        return [replace(entry, dtype=source.dtype, how="requantized", transposed=False)]
    return [PlannedTensor(name, part, part.dtype, "copied") for name, part in source.parts.items()]


def _plan_tensor(
    base: MetaModel,
    name: str,
    tensor: Tensor | QuantizedWeight,
    key: str | None,
    changes: _AdapterChanges,
    dtype: torch.dtype | None,
) -> PlannedTensor:
    """One stored tensor, with what the adapters do to it."""
    own = dtype if dtype is not None and tensor.dtype in _FOLDABLE_DTYPES else tensor.dtype
    updates = tuple(changes.updates.pop(key, ()) if key else changes.parts.pop(name, ()))
    value = changes.values.pop(key, None) if key else None
    rows = changes.rows.pop(key, None) if key else None
    path = (key or name).removesuffix(".weight") if updates else (key or "").rpartition(".")[0]
    if rows is not None:
        if tensor.dtype not in _FOLDABLE_DTYPES:
            raise MergeError(f"{path} is quantised ({tensor.dtype}); its rows are not replaced")
        return PlannedTensor(name, tensor, own, "with new rows", path, rows=rows)
    if value is not None:
        return PlannedTensor(name, value, own if value.is_floating_point() else value.dtype, "replaced", path)
    if updates:
        if tensor.dtype not in _FOLDABLE_DTYPES:
            raise MergeError(
                f"{path} is quantised ({tensor.dtype}); a delta would be lost in it",
                hint="merge into the 16-bit original",
            )
        transposed = bool(key) and _is_transposed(
            base.model.get_submodule((key or "").rpartition(".")[0]), tensor, updates
        )
        return PlannedTensor(name, tensor, own, "folded", path, updates, transposed)
    if isinstance(tensor, QuantizedWeight):
        return PlannedTensor(name, tensor, own, "dequantized")
    return PlannedTensor(name, tensor, own, "copied" if own == tensor.dtype else "cast")


def _is_transposed(module: nn.Module, tensor: Tensor | QuantizedWeight, updates: Sequence[WeightUpdate]) -> bool:
    """Whether a weight, or each of its matrices, is kept as (in, out)."""
    kinds = {update.pair.kind for update in updates}
    if "parameter" not in kinds:
        return is_stored_transposed(module)
    if len(kinds) > 1:
        raise MergeError(
            "two adapters change one weight, one as a layer and one as a parameter", hint="merge one first"
        )
    return tensor.ndim == 3 and is_transposed(module)


def _plan_untied_tensor(
    base: MetaModel, key: str, changes: _AdapterChanges, dtype: torch.dtype | None
) -> PlannedTensor:
    """The tensor of a key that had none of its own: the one it was tied to, with its own changes."""
    value = base.values[key]
    return _plan_tensor(base, key, value, key, changes, dtype)


def _plan_added_tensors(base: MetaModel, changes: _AdapterChanges, dtype: torch.dtype) -> list[PlannedTensor]:
    """What saved modules bring that the base does not have: a new head."""
    new = [key for key in sorted(changes.values) if key in base.missing]
    tensors = [(key, changes.values.pop(key)) for key in new]
    return [
        PlannedTensor(key, value, dtype if value.is_floating_point() else value.dtype, "added", key.rpartition(".")[0])
        for key, value in tensors
    ]


def _find_usual_dtype(shards: Sequence[Shard]) -> torch.dtype:
    """The floating dtype most of the base is kept in."""
    sizes: Counter[torch.dtype] = Counter()
    for shard in shards:
        for tensor in shard.tensors.values():
            if tensor.is_floating_point():
                sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32
