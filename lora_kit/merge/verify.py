"""Proving a merge from what was written: it loads as the model it should be, and its numbers are base + adapter.

What is compared was read back by the safetensors library, and what it is compared with is computed in fp64 from the
adapter's own tensors, by state dict key: nothing of the plan, the fold or the writing is used.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from lora_kit.adapter import Adapter
from lora_kit.errors import BaseModelError, MergeError, VerificationError, listed
from lora_kit.fold import Retention
from lora_kit.layers import keeps_transposed
from lora_kit.merge.decode import check_quantized, decoded, whole_blocks
from lora_kit.merge.outline import Head, Outline, outline
from lora_kit.merge.packed import Packed
from lora_kit.merge.plan import Part
from lora_kit.merge.quantized import packed_by_key
from lora_kit.merge.shards import Shard, read_shards, unpacked

LEAST_RETAINED: Final = 0.5
"""Share of a tensor's delta that must survive rounding, unless its loss is allowed."""
_SHOWN: Final = 5
_ROWS: Final = 16
"""Of a tensor, evenly spaced, that are compared; of an untouched one likewise."""


def check_retention(found: Sequence[Retention], *, dtype: str, allow: Collection[str]) -> None:
    """Raise MergeError where rounding has eaten most of a delta, with a table of the worst."""
    lost = sorted((one for one in found if one.retained < LEAST_RETAINED), key=lambda one: one.retained)
    if not lost or "lost-delta" in allow:
        return
    table = [f"{one.path}: {one.retained:.0%} of a delta {one.relative:.2g} of the weight" for one in lost[:_SHOWN]]
    finer = "merge with dtype float32" if "float" in dtype else "merge into the original or the dequantised weights"
    head = f"less than {LEAST_RETAINED:.0%} of {len(lost)} of {len(found)} deltas survives rounding to {dtype}"
    raise MergeError(
        "\n  ".join([head, *table]),
        hint=f"{finer}, keep the adapter beside its base, or allow 'lost-delta'",
    )


def check_result(folder: Path, base: Outline, shards: Sequence[Shard], parts: Sequence[Part], *, head: Head) -> int:
    """Raise VerificationError unless a folder holds the base with these adapters folded in.

    Args:
        base: the base's outline. shards: its files.

    Returns:
        How many numbers were compared.
    """
    written = read_shards(folder)
    try:
        if any(shard.packed for shard in shards):
            written = unpacked(written, next(one.dtype for shard in shards for one in shard.packed.values()))
        merged = outline(folder, written, head)
    except BaseModelError as error:
        raise VerificationError(f"what was written does not load: {error.message}") from None
    _check_places(base, merged, parts)
    compared = _check_untouched(base, merged, shards, written, parts)
    for part in parts:
        compared += _check_saved(merged, part.adapter)
    return compared + _check_folded(base, merged, parts, packed_by_key(base, shards), packed_by_key(merged, written))


def _check_places(base: Outline, merged: Outline, parts: Sequence[Part]) -> None:
    """Every parameter is there, and those that an adapter changes are their own."""
    absent = sorted({*merged.missing, *(base.names.keys() - merged.names.keys())})
    if absent:
        raise VerificationError(f"what was written has no {listed(absent)}")
    if merged.unclaimed:
        raise VerificationError(f"what was written has tensors of no use: {listed(merged.unclaimed)}")
    for key in sorted(_changed(parts)):
        if len(merged.declared_with(key)) > 1:
            told = " and ".join(merged.declared_with(key))
            raise VerificationError(f"the merged model's config ties {told}, of which the adapter changes one")


def _changed(parts: Sequence[Part]) -> set[str]:
    adapters = [part.adapter for part in parts]
    return {f"{path}.weight" for adapter in adapters for path in adapter.pairs()} | {
        key for adapter in adapters for key in adapter.saved()
    }


def _check_untouched(
    base: Outline, merged: Outline, shards: Sequence[Shard], written: Sequence[Shard], parts: Sequence[Part]
) -> int:
    """What no adapter changes has the base's numbers, sample by sample."""
    changed, compared = _changed(parts), 0
    places = {name: key for key, name in merged.names.items()}
    own = {name: tensor for shard in shards for name, tensor in shard.tensors.items()}
    packed, packed_now = ({n: one for shard in some for n, one in shard.packed.items()} for some in (shards, written))
    values = base.model.state_dict()
    for name, tensor in ((name, tensor) for shard in written for name, tensor in shard.tensors.items()):
        key = places.get(name)
        if key in changed:
            continue
        wanted = own.get(name, values.get(key or ""))
        if wanted is None or wanted.shape != tensor.shape or (name in packed_now and name not in packed):
            raise VerificationError(f"{name} was written and is not the base's")
        if name in packed_now:
            compared += sum(
                _check_same(part, packed_now[name].parts[part], value) for part, value in packed[name].parts.items()
            )
        elif name in packed:
            rows = _places(tensor.shape[0])
            compared += _check_same(name, tensor[rows], decoded(packed[name], rows))
        else:
            compared += _check_same(name, tensor, wanted)
    return compared


def _check_saved(merged: Outline, adapter: Adapter) -> int:
    by_key = merged.model.state_dict()
    return sum(_check_same(key, by_key[key], tensor) for key, tensor in adapter.saved().items())


def _check_same(name: str, found: Tensor, wanted: Tensor) -> int:
    rows, other = _sampled(found), _sampled(wanted).to(found.dtype)
    if not torch.equal(_bits(rows), _bits(other)):
        raise VerificationError(f"{name} was written with other numbers than it should have")
    return rows.numel()


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: NaN, which a base may hold, is not equal to itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _sampled(tensor: Tensor) -> Tensor:
    """Some rows of a tensor; all of a short one."""
    if tensor.ndim < 2:
        return tensor
    flat = tensor.flatten(0, -2)
    return flat[_places(flat.shape[0])]


def _places(count: int) -> Tensor:
    return torch.linspace(0, count - 1, min(_ROWS, count), dtype=torch.float64).long()


def _check_folded(
    base: Outline,
    merged: Outline,
    parts: Sequence[Part],
    packed: Mapping[str, Packed],
    packed_now: Mapping[str, Packed],
) -> int:
    """Some outputs of every folded weight: merged - base is what the adapters say."""
    compared = 0
    own, found = base.model.state_dict(), merged.model.state_dict()
    for path in sorted({path for part in parts for path in part.adapter.pairs()}):
        sides = [part for part in parts if path in part.adapter.pairs()]
        key = f"{path}.weight"
        by_column = type(base.model.get_submodule(path)).__name__ == "Conv1D"
        transposed = keeps_transposed(base.model.get_submodule(path))
        again = packed_now.get(key)
        rows = whole_blocks(again, _ROWS) if again else _places(own[key].shape[1 if by_column else 0])
        before = decoded(packed[key], rows) if key in packed else own[key][:, rows].T if by_column else own[key][rows]
        wanted, bound = _expected(path, before.double(), rows, sides, by_entry=transposed and not by_column)
        if again:
            exact = {} if sides[0].adapter.pairs()[path].magnitude is None else {"exact": 0.0}
            check_quantized(again, rows, wanted, **exact)
        else:
            _check_close(path, (found[key][:, rows].T if by_column else found[key][rows]), wanted, bound)
        compared += wanted.numel()
    return compared


def _check_close(path: str, found: Tensor, wanted: Tensor, bound: Tensor) -> None:
    """Raise VerificationError where numbers are further away than rounding may take them."""
    info = torch.finfo(found.dtype)
    bound = bound + info.eps / 2 * 1.01 * wanted.abs() + info.tiny
    off = (found.double() - wanted).abs()
    if not (off - bound).max() <= 0:
        raise VerificationError(
            f"{path}: what was written is up to {float(off.max()):.3g} away from base + adapter; rounding allows "
            f"{float(bound.max()):.3g} at most"
        )


def _expected(
    path: str, before: Tensor, rows: Tensor, parts: Sequence[Part], *, by_entry: bool
) -> tuple[Tensor, Tensor]:
    """Some outputs of base + adapters in fp64, and how far a sum of them in fp32 may be off.

    Args:
        before: those outputs of the base. rows: which they are.
        by_entry: whether they are the entries of an embedding.
    """
    wanted, size = before.clone(), before.abs()
    rank = 0
    for part in parts:
        pair, scaling = part.adapter.pairs()[path], part.adapter.config.scaling_of(path) * part.weight
        a, b = (pair.b.T, pair.a.T[rows]) if by_entry else (pair.a, pair.b[rows])
        wanted += scaling * (b.double() @ a.double())
        size = size + abs(scaling) * (b.double().abs() @ a.double().abs())
        rank += pair.a.shape[0]
    error = (rank + 4) * torch.finfo(torch.float32).eps * size
    magnitude = parts[0].adapter.pairs()[path].magnitude
    if magnitude is not None:
        columns = (magnitude[rows].double() / wanted.norm(dim=1)).unsqueeze(1)
        # A DoRA's norm is taken of factors rounded to the base's dtype, as they are when the adapter is used.
        error = columns.abs() * (error + _DORA * wanted.abs())
        wanted = columns * wanted
    return wanted, error


_DORA: Final = 2**-7
