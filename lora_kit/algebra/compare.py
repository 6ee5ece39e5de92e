"""How alike two adapters are, without forming a dense delta."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_like import AdapterLike
from lora_kit.adapter.store import to_json_value
from lora_kit.algebra.low_rank import LowRankUpdate, ThinSvd
from lora_kit.algebra.sources import SourceAdapter, find_common_base
from lora_kit.errors import MergeError, format_list

_ROUNDING_SHARE: Final = 1e-6
"""A singular value below this share of the largest counts as rounding."""


@dataclass(frozen=True)
class Likeness:
    """How alike the updates D and D' of one layer are.

    Attributes:
        cosine: `⟨D, D'⟩ / (‖D‖ ‖D'‖)`, from -1 to 1.
        inputs: the overlap of their row spaces, which they read: `‖Vᵀ V'‖² / min(rank, rank')` of orthonormal bases,
            from 0 to 1 (Hu et al. 2021, arXiv 2106.09685, 7.2).
        outputs: the same of their column spaces, which they write.
        norms: of D and D'.
    """

    cosine: float
    inputs: float
    outputs: float
    norms: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """How alike two adapters are.

    Attributes:
        cosine: of all updates together; a layer that only one of them has counts as zero in the other.
        layers: of the layers that both have, by path.
        alone: layers that only the first has, and layers that only the second has.
        configs: fields that differ, with both values.
        saved: for each tensor of `modules_to_save`: `equal`, `different`, `only first` or `only second`.
    """

    cosine: float
    layers: Mapping[str, Likeness]
    alone: tuple[tuple[str, ...], tuple[str, ...]]
    configs: Mapping[str, tuple[object, object]]
    saved: Mapping[str, str]

    def to_json(self) -> dict[str, object]:
        fields: dict[str, object] = to_json_value(self)
        return fields


def compare(one: AdapterLike, other: AdapterLike, *, allow: Collection[str] = ()) -> Comparison:
    """Return how alike two adapters of one base are.

    Args:
        one: a folder, a name in the store or an Adapter.
        other: the same.
        allow: `other-base`: adapters that were made for different bases; and what else `Adapter.load` allows.

    Raises:
        BaseMismatchError: they were made for different bases.
        MergeError: one is a DoRA, or a layer has different shapes.
        UnknownAdapterError, AdapterError: an adapter is not there or cannot be read.
    """
    sources = [SourceAdapter.of(one, allow=allow), SourceAdapter.of(other, allow=allow)]
    for source in sources:
        source.check_linear("compared")
    find_common_base(sources, allow=allow)
    first, second = ({path: update for path, (_, update) in source.updates().items()} for source in sources)
    unlike = [path for path in first if path in second and first[path].shape != second[path].shape]
    if unlike:
        message = f"layers of different shapes cannot be compared: {format_list(unlike)}"
        raise MergeError(message, hint="compare adapters of one base")
    layers = {path: _compare_layer(first[path], second[path]) for path in first if path in second}
    product = math.fsum(likeness.cosine * math.prod(likeness.norms) for likeness in layers.values())
    norms = [math.sqrt(math.fsum(update.norm() ** 2 for update in own.values())) for own in (first, second)]
    a, b = (source.adapter for source in sources)
    return Comparison(
        cosine=_divide_or_zero(product, math.prod(norms)),
        layers=layers,
        alone=(tuple(p for p in first if p not in second), tuple(p for p in second if p not in first)),
        configs=_compare_configs(a, b),
        saved=_compare_saved_modules(a.saved(), b.saved()),
    )


def _compare_layer(one: LowRankUpdate, other: LowRankUpdate) -> Likeness:
    a, b = one.svd(), other.svd()
    norms = float(a.s.norm()), float(b.s.norm())
    return Likeness(
        cosine=_divide_or_zero(one.inner(other), math.prod(norms)),
        inputs=_measure_overlap(_drop_rounding_directions(a).vh, _drop_rounding_directions(b).vh),
        outputs=_measure_overlap(_drop_rounding_directions(a).u.T, _drop_rounding_directions(b).u.T),
        norms=norms,
    )


def _drop_rounding_directions(svd: ThinSvd) -> ThinSvd:
    """Return the triplets whose singular values are more than rounding."""
    count = int((svd.s > _ROUNDING_SHARE * svd.s[0]).sum())
    return ThinSvd(svd.u[:, :count], svd.s[:count], svd.vh[:count])


def _measure_overlap(one: Tensor, other: Tensor) -> float:
    """Return the overlap of the spaces that two sets of orthonormal rows span, from 0 to 1."""
    return _divide_or_zero(float((one @ other.T).square().sum()), min(len(one), len(other)))


def _divide_or_zero(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _compare_configs(one: Adapter, other: Adapter) -> dict[str, tuple[object, object]]:
    first, second = one.config.to_dict(), other.config.to_dict()
    names = sorted(first.keys() | second.keys())
    return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}


def _compare_saved_modules(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, str]:
    def compare_tensor(key: str) -> str:
        if key not in other:
            return "only first"
        if key not in one:
            return "only second"
        same = one[key].shape == other[key].shape and torch.equal(one[key], other[key].to(one[key].dtype))
        return "equal" if same else "different"

    return {key: compare_tensor(key) for key in sorted(one.keys() | other.keys())}
