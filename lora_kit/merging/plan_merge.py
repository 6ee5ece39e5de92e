"""Planning a merge: how every tensor of the result is made, decided and checked before anything is written.

Every tensor of an adapter goes into exactly one tensor of the result; otherwise it is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from torch import Tensor, nn

from lora_kit.adapter.peft_keys import LoraWeights
from lora_kit.errors import BaseModelError, MergeError, format_list
from lora_kit.layers.introspect import is_stored_transposed
from lora_kit.layers.own_forward import reason_not_mergeable
from lora_kit.layers.parameter import is_transposed
from lora_kit.merging.checkpoint.bnb_weights import QuantizedWeight
from lora_kit.merging.checkpoint.meta_model import MetaModel, TaskHead, build_empty_model
from lora_kit.merging.checkpoint.shards import Shard
from lora_kit.merging.new_token_rows import TokenEmbeddingsByKey, add_token_embeddings, has_equal_rows
from lora_kit.merging.planned_tensors import MergePlan, PlannedTensor, WeightedAdapter, WeightUpdate
from lora_kit.targets.compatibility import match_adapter
from lora_kit.targets.layer_target import LayerTarget

_FOLDABLE_DTYPES: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class _AdapterChanges:
    """The changes of adapters that no tensor has taken yet.

    Attributes:
        updates: to add, by state dict key.
        fused: updates of parameters that the files hold as several tensors, by the names of these tensors.
        values: `modules_to_save`, by state dict key.
        rows: token embeddings, by state dict key.
    """

    updates: dict[str, list[WeightUpdate]] = field(default_factory=dict)
    fused: dict[str, list[WeightUpdate]] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    rows: TokenEmbeddingsByKey = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        return sorted({*self.updates, *self.fused, *self.values, *self.rows})


def plan_merge(
    base: MetaModel,
    shards: Sequence[Shard],
    adapters: Sequence[WeightedAdapter],
    *,
    head: TaskHead,
    dtype: torch.dtype | None,
    allow: Collection[str],
    quantized: str | None = None,
) -> MergePlan:
    """Return the plan of a merge.

    Args:
        base: its meta model.
        shards: its files.
        adapters: to merge.
        head: of the merged model.
        dtype: of the floating tensors of the result; None: each keeps its own.
        allow: as in `merge`.
        quantized: as in `merge`.

    Raises:
        AdapterError, BaseMismatchError: an adapter does not match the base.
        MergeError: a change has no tensor, or one that is shared or that nothing can be folded into.
        BaseModelError: the files do not fill the base's own model.
    """
    changes = _collect_changes(base, adapters, allow)
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
    # A key without a tensor of its own gets a copy of the one it was tied to, with its own changes.
    last += [_plan_tensor(base, key, base.values[key], key, changes, dtype) for key in untied if key not in base.names]
    last += _plan_added_tensors(base, changes, dtype or _find_usual_dtype(shards))
    if changes.keys:
        raise MergeError(f"the base's files have no {format_list(changes.keys)}, which the adapter changes")
    # Wide dtypes first, as safetensors aligns them; within one width the order of the base.
    ordered = {name: tuple(sorted(own, key=_width_of, reverse=True)) for name, own in entries.items()}
    # A file that held only parts of weights of other files is not written.
    filled = tuple((shard, ordered[shard.name]) for shard in shards if ordered[shard.name])
    return MergePlan(filled, untied, tuple(sorted(left_out)))


def _check_mergeable(model: nn.Module, target: LayerTarget) -> None:
    module = None if target.kind == "parameter" else model.get_submodule(target.path)
    reason = None if module is None else reason_not_mergeable(module)
    if reason is not None:
        raise MergeError(f"{target.path} cannot be merged: {reason}", hint="keep the adapter beside this base")


def _collect_changes(base: MetaModel, adapters: Sequence[WeightedAdapter], allow: Collection[str]) -> _AdapterChanges:
    changes = _AdapterChanges()
    for name, adapter, weight in adapters:
        coverage = match_adapter(name, adapter, base.model, dtype=torch.float32, allow=allow)
        add_token_embeddings(changes.rows, WeightedAdapter(name, adapter, weight), coverage)
        alone = weight == 1 and len(adapters) == 1
        if not alone and adapter.config.use_dora:
            raise MergeError(f"{name!r} is a DoRA, which scales the whole weight", hint="merge it alone, with weight 1")
        if weight != 1 and coverage.saved:
            message = f"{name!r} replaces {format_list(coverage.saved)}, which cannot be weighted"
            raise MergeError(message, hint="give weight 1")
        for target in coverage.targets:
            _check_mergeable(base.model, target)
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


def _build_updates(weights: LoraWeights, target: LayerTarget, weight: float) -> list[WeightUpdate]:
    """Return what LoRA weights add, an update for each matrix."""
    scaling, kind = target.scaling * weight, weights.kind
    if kind == "convolution":
        return [WeightUpdate(LoraWeights(weights.a.flatten(1), weights.b.flatten(1), kind), scaling)]
    if kind != "parameter":
        return [WeightUpdate(weights, scaling)]
    by_expert = enumerate(weights.split_by_expert(target.rank))
    return [WeightUpdate(LoraWeights(a, b, kind), scaling, expert) for expert, (a, b) in by_expert]


def _split_fused_updates(base: MetaModel, changes: _AdapterChanges) -> None:
    """Split the updates of fused parameters among the tensors that the files hold."""
    for key in [key for key in changes.updates if key in base.converted]:
        pieces = base.find_pieces(key)
        if pieces is None:
            raise _unknown_form_error([key])
        updates = changes.updates.pop(key)
        for piece in pieces:
            own = [update.rows(piece.begin, piece.end) for update in updates if update.expert == piece.expert]
            changes.fused[piece.name] = own


def _unknown_form_error(keys: Sequence[str]) -> MergeError:
    return MergeError(
        f"the base's files hold {format_list(keys)} in another form, into which nothing can be folded",
        hint="save the base with transformers in the form it has in memory",
    )


def _check_base(base: MetaModel, head: TaskHead, changes: _AdapterChanges) -> None:
    missing = [key for key in base.missing if key not in changes.values]
    if missing:
        hint = "the adapter must bring a new head" if head.fields else "the base is incomplete"
        raise BaseModelError(f"nothing in the base's files fills {format_list(missing)}", hint=hint)
    # A model with another head does not have the tensors of the base's own head.
    same = type(base.model).__name__ in (getattr(base.config, "architectures", None) or ())
    if base.unclaimed and (same or not head.fields):
        model = type(base.model).__name__
        raise BaseModelError(f"{model} has no place for {format_list(base.unclaimed)} of the base's files")
    converted = [key for key in changes.keys if key in base.converted]
    if converted:
        raise _unknown_form_error(converted)


def _find_untied_keys(
    base: MetaModel, head: TaskHead, changes: _AdapterChanges, allow: Collection[str]
) -> tuple[str, ...]:
    """Return the keys that must become parameters of their own, since an adapter changes only one of them."""
    groups = {base.find_declared_ties(key) for key in changes.keys}
    for group in [group for group in groups if len(group) > 1 and has_equal_rows(changes.rows, group)]:
        groups.remove(group)
        for key in group:
            if key not in base.names:  # the tensor that it is tied to takes them
                del changes.rows[key]
    keys = tuple(key for group in sorted(groups) if len(group) > 1 for key in group)
    # Tensors that the files hold apart are loaded apart, whatever the config says.
    shared = [key for key in keys if len(base.find_tied_keys(key)) > 1]
    if shared and "untie" not in allow:
        raise MergeError(
            f"the adapter changes a weight that is shared: {' and '.join(shared)} are one parameter",
            hint="allow 'untie' to write each of them, and a config that no longer ties them",
        )
    if not keys:
        return ()
    state = build_untied_model(base, head).state_dict(keep_vars=True)
    if len({id(state[key]) for key in keys}) < len(keys):
        raise MergeError(f"{' and '.join(keys)} are one parameter in every model of this kind, and cannot be untied")
    return keys


def build_untied_model(base: MetaModel, head: TaskHead) -> nn.Module:
    """Return the empty model of the base, with a config that ties nothing."""
    config = type(base.config).from_dict({**base.config.to_dict(), "tie_word_embeddings": False})
    return build_empty_model(config, head)


def _width_of(entry: PlannedTensor) -> int:
    """Return the bytes of a value; a requantized weight, which has several dtypes, comes before all others."""
    return 2**10 if entry.how == "requantized" else entry.dtype.itemsize


def _apply_quantized_choice(
    entry: PlannedTensor, base: MetaModel, key: str, quantized: str | None
) -> list[PlannedTensor]:
    """Return the plan of a tensor, with the choice for a quantized base applied."""
    source = entry.source
    if not isinstance(source, QuantizedWeight):
        return [entry]
    if quantized != "requantized":
        if is_stored_transposed(base.model.get_submodule(key.rpartition(".")[0])):
            raise MergeError(
                f"{entry.name} is a quantized Conv1D, which cannot be written dequantized",
                hint="merge into the original, or requantize",
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
    """Return the plan of one stored tensor, with the changes of the adapters to it."""
    own = dtype if dtype is not None and tensor.dtype in _FOLDABLE_DTYPES else tensor.dtype
    updates = tuple(changes.updates.pop(key, ()) if key else changes.fused.pop(name, ()))
    value = changes.values.pop(key, None) if key else None
    rows = changes.rows.pop(key, None) if key else None
    path = (key or name).removesuffix(".weight") if updates else (key or "").rpartition(".")[0]
    if rows is not None:
        if tensor.dtype not in _FOLDABLE_DTYPES:
            raise MergeError(f"{path} is quantized ({tensor.dtype}); its rows cannot be replaced")
        return PlannedTensor(name, tensor, own, "with new rows", path, rows=rows)
    if value is not None:
        return PlannedTensor(name, value, own if value.is_floating_point() else value.dtype, "replaced", path)
    if updates:
        if tensor.dtype not in _FOLDABLE_DTYPES:
            raise MergeError(
                f"{path} is quantized ({tensor.dtype}); rounding would lose the delta",
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
    """Whether a weight, or each of its matrices, is stored as (in, out)."""
    kinds = {update.weights.kind for update in updates}
    if "parameter" not in kinds:
        return is_stored_transposed(module)
    if len(kinds) > 1:
        message = "two adapters change one weight, one as a layer and one as a parameter"
        raise MergeError(message, hint="merge one after the other")
    return tensor.ndim == 3 and is_transposed(module)


def _plan_added_tensors(base: MetaModel, changes: _AdapterChanges, dtype: torch.dtype) -> list[PlannedTensor]:
    """Return the plans of the `modules_to_save` that the base does not have: a new head."""
    tensors = [(key, changes.values.pop(key)) for key in sorted(changes.values) if key in base.missing]
    return [
        PlannedTensor(key, value, dtype if value.is_floating_point() else value.dtype, "added", key.rpartition(".")[0])
        for key, value in tensors
    ]


def _find_usual_dtype(shards: Sequence[Shard]) -> torch.dtype:
    """Return the floating dtype of most values of the base."""
    sizes: Counter[torch.dtype] = Counter()
    for shard in shards:
        for tensor in shard.tensors.values():
            if tensor.is_floating_point():
                sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32
