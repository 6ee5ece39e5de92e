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

from lora_kit.adapter.peft_keys import Pair
from lora_kit.errors import BaseModelError, MergeError, listed
from lora_kit.layers.introspect import keeps_transposed
from lora_kit.layers.parameter import is_transposed
from lora_kit.merging.checkpoint.bnb_weights import Packed
from lora_kit.merging.checkpoint.meta_model import Head, Outline, shell
from lora_kit.merging.checkpoint.shards import Shard
from lora_kit.merging.new_token_rows import Rows, add_rows, alike
from lora_kit.merging.planned_tensors import Entry, Part, Plan, Update
from lora_kit.targets.compatibility import fitted
from lora_kit.targets.coverage import Target

_FOLDABLE: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class _Changes:
    """What adapters do to a model, by state dict key; emptied as it finds its place.

    Attributes:
        parts: the same by name in the base's files, where a parameter is several tensors there.
        rows: that take the places of a table's own.
    """

    updates: dict[str, list[Update]] = field(default_factory=dict)
    parts: dict[str, list[Update]] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    rows: Rows = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        return sorted({*self.updates, *self.parts, *self.values, *self.rows})


def plan(
    base: Outline,
    shards: Sequence[Shard],
    parts: Sequence[Part],
    *,
    head: Head,
    dtype: torch.dtype | None,
    allow: Collection[str],
    quantized: str | None = None,
) -> Plan:
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
    changes = _changes(base, parts, allow)
    _take_apart(base, changes)
    _check_base(base, head, changes)
    untied = _untied(base, head, changes, allow)
    own = {name: key for key, name in base.names.items()}
    left_out = set(base.unclaimed)
    entries = {
        shard.name: [
            entry
            for name, tensor in shard.tensors.items()
            if name not in left_out
            for entry in _as_asked(
                _entry(base, name, shard.packed.get(name, tensor), own.get(name), changes, dtype),
                base,
                own.get(name, ""),
                quantized,
            )
        ]
        for shard in shards
    }
    last = entries[shards[-1].name]
    last += [_untied_copy(base, key, changes, dtype) for key in untied if key not in base.names]
    last += _added(base, changes, dtype or _usual_dtype(shards))
    if changes.keys:
        raise MergeError(f"nothing in the base's files is {listed(changes.keys)}, which the adapter changes")
    # Wide tensors first, as safetensors aligns them; within a width the base's own order.
    ordered = {name: tuple(sorted(found, key=_width, reverse=True)) for name, found in entries.items()}
    # A file that held nothing but parts of other files' weights has nothing left to hold.
    filled = tuple((shard, ordered[shard.name]) for shard in shards if ordered[shard.name])
    return Plan(filled, untied, tuple(sorted(left_out)))


def _changes(base: Outline, parts: Sequence[Part], allow: Collection[str]) -> _Changes:
    changes = _Changes()
    for name, adapter, weight in parts:
        coverage = fitted(name, adapter, base.model, dtype=torch.float32, allow=allow)
        add_rows(changes.rows, Part(name, adapter, weight), coverage)
        alone = weight == 1 and len(parts) == 1
        if not alone and adapter.config.use_dora:
            raise MergeError(f"{name!r} is a DoRA, which scales the whole weight", hint="merge it alone, with weight 1")
        if weight != 1 and coverage.saved:
            raise MergeError(f"{name!r} replaces {listed(coverage.saved)}, which cannot be weighted", hint="weight 1")
        for target in coverage.targets:
            key = target.path if target.kind == "parameter" else f"{target.path}.weight"
            changes.updates.setdefault(key, []).extend(_updates(adapter.all_pairs()[target.key], target, weight))
        for key, tensor in adapter.saved().items():
            if key in changes.values:
                raise MergeError(f"two of the adapters replace {key}", hint="merge them one after the other")
            changes.values[key] = tensor
    both = sorted((changes.updates.keys() | changes.rows.keys()) & changes.values.keys())
    both += sorted(changes.rows.keys() & changes.updates.keys())
    if both:
        raise MergeError(f"one adapter replaces what another changes: {listed(both)}")
    return changes


def _updates(pair: Pair, target: Target, weight: float) -> list[Update]:
    """What a pair adds, matrix by matrix."""
    scaling = target.scaling * weight
    if pair.kind == "convolution":
        return [Update(Pair(pair.a.flatten(1), pair.b.flatten(1), pair.kind), scaling)]
    if pair.kind != "parameter":
        return [Update(pair, scaling)]
    each = pair.by_expert(target.rank)
    return [Update(Pair(a, b, pair.kind), scaling, number) for number, (a, b) in enumerate(each)]


def _take_apart(base: Outline, changes: _Changes) -> None:
    """Of a parameter that the files hold as several tensors, give each its share of what is added."""
    for key in [key for key in changes.updates if key in base.converted]:
        pieces = base.pieces(key)
        if pieces is None:
            raise MergeError(
                f"the base's files hold {key} in another form, which nothing is folded into",
                hint="save the base with transformers in the form it has in memory",
            )
        updates = changes.updates.pop(key)
        for piece in pieces:
            own = [update.rows(piece.begin, piece.end) for update in updates if update.expert == piece.expert]
            changes.parts[piece.name] = own


def _check_base(base: Outline, head: Head, changes: _Changes) -> None:
    missing = [key for key in base.missing if key not in changes.values]
    if missing:
        hint = "a new head must come with the adapter" if head.fields else "the base is not whole"
        raise BaseModelError(f"nothing in the base's files fills {listed(missing)}", hint=hint)
    # A model with another head than the base's own has no place for that one's tensors.
    same = type(base.model).__name__ in (getattr(base.config, "architectures", None) or ())
    if base.unclaimed and (same or not head.fields):
        raise BaseModelError(
            f"{type(base.model).__name__} has no place for {listed(base.unclaimed)} of the base's files"
        )
    converted = [key for key in changes.keys if key in base.converted]
    if converted:
        raise MergeError(
            f"the base's files hold {listed(converted)} in another form, which nothing is folded into",
            hint="save the base with transformers in the form it has in memory",
        )


def _untied(base: Outline, head: Head, changes: _Changes, allow: Collection[str]) -> tuple[str, ...]:
    """Keys that must be parameters of their own, since an adapter changes one and not the other."""
    groups = {base.declared_with(key) for key in changes.keys}
    for group in [group for group in groups if len(group) > 1 and alike(changes.rows, group)]:
        groups.remove(group)
        for key in group:
            if key not in base.names:  # what it is tied to has them
                del changes.rows[key]
    keys = tuple(key for group in sorted(groups) if len(group) > 1 for key in group)
    # What the files hold apart is loaded apart, whatever the config says of it.
    shared = [key for key in keys if len(base.tied_with(key)) > 1]
    if shared and "untie" not in allow:
        raise MergeError(
            f"the adapter changes a weight that is shared: {' and '.join(shared)} are one parameter",
            hint="allow 'untie' to write each of them, and a config that no longer ties them",
        )
    if not keys:
        return ()
    apart = {id(tensor) for key, tensor in untied_shell(base, head).state_dict(keep_vars=True).items() if key in keys}
    if len(apart) < len(keys):
        raise MergeError(f"{' and '.join(keys)} are one parameter in every model of this kind, and cannot be untied")
    return keys


def untied_shell(base: Outline, head: Head) -> Any:
    """The base's model without weights, its config saying that nothing is tied."""
    config = type(base.config).from_dict({**base.config.to_dict(), "tie_word_embeddings": False})
    return shell(config, head)


def _width(entry: Entry) -> int:
    """Bytes of a number; what is quantised again has several kinds and comes before all others, wide ones first."""
    return 2**10 if entry.how == "requantized" else entry.dtype.itemsize


def _as_asked(entry: Entry, base: Outline, key: str, quantized: str | None) -> list[Entry]:
    """What becomes of a tensor that may be a quantised weight."""
    source = entry.source
    if not isinstance(source, Packed):
        return [entry]
    if quantized != "requantized":
        if keeps_transposed(base.model.get_submodule(key.rpartition(".")[0])):
            raise MergeError(
                f"{entry.name} is a quantised Conv1D, which is not written dequantised",
                hint="merge into the original, or requantise",
            )
        return [entry]
    if entry.updates:
        return [replace(entry, dtype=source.dtype, how="requantized", transposed=False)]
    return [Entry(name, part, part.dtype, "copied") for name, part in source.parts.items()]


def _entry(
    base: Outline, name: str, tensor: Tensor | Packed, key: str | None, changes: _Changes, dtype: torch.dtype | None
) -> Entry:
    """One stored tensor, with what the adapters do to it."""
    own = dtype if dtype is not None and tensor.dtype in _FOLDABLE else tensor.dtype
    updates = tuple(changes.updates.pop(key, ()) if key else changes.parts.pop(name, ()))
    value = changes.values.pop(key, None) if key else None
    rows = changes.rows.pop(key, None) if key else None
    path = (key or name).removesuffix(".weight") if updates else (key or "").rpartition(".")[0]
    if rows is not None:
        if tensor.dtype not in _FOLDABLE:
            raise MergeError(f"{path} is quantised ({tensor.dtype}); its rows are not replaced")
        return Entry(name, tensor, own, "with new rows", path, rows=rows)
    if value is not None:
        return Entry(name, value, own if value.is_floating_point() else value.dtype, "replaced", path)
    if updates:
        if tensor.dtype not in _FOLDABLE:
            raise MergeError(
                f"{path} is quantised ({tensor.dtype}); a delta would be lost in it",
                hint="merge into the 16-bit original",
            )
        transposed = bool(key) and _is_transposed(
            base.model.get_submodule((key or "").rpartition(".")[0]), tensor, updates
        )
        return Entry(name, tensor, own, "folded", path, updates, transposed)
    if isinstance(tensor, Packed):
        return Entry(name, tensor, own, "dequantized")
    return Entry(name, tensor, own, "copied" if own == tensor.dtype else "cast")


def _is_transposed(module: nn.Module, tensor: Tensor | Packed, updates: Sequence[Update]) -> bool:
    """Whether a weight, or each of its matrices, is kept as (in, out)."""
    kinds = {update.pair.kind for update in updates}
    if "parameter" not in kinds:
        return keeps_transposed(module)
    if len(kinds) > 1:
        raise MergeError(
            "two adapters change one weight, one as a layer and one as a parameter", hint="merge one first"
        )
    return tensor.ndim == 3 and is_transposed(module)


def _untied_copy(base: Outline, key: str, changes: _Changes, dtype: torch.dtype | None) -> Entry:
    """The tensor of a key that had none of its own: the one it was tied to, with its own changes."""
    value = base.values[key]
    return _entry(base, key, value, key, changes, dtype)


def _added(base: Outline, changes: _Changes, dtype: torch.dtype) -> list[Entry]:
    """What saved modules bring that the base does not have: a new head."""
    new = [key for key in sorted(changes.values) if key in base.missing]
    tensors = [(key, changes.values.pop(key)) for key in new]
    return [
        Entry(key, value, dtype if value.is_floating_point() else value.dtype, "added", key.rpartition(".")[0])
        for key, value in tensors
    ]


def _usual_dtype(shards: Sequence[Shard]) -> torch.dtype:
    """The floating dtype most of the base is kept in."""
    sizes: Counter[torch.dtype] = Counter()
    for shard in shards:
        for tensor in shard.tensors.values():
            if tensor.is_floating_point():
                sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32
