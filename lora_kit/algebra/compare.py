"""Looking at updates without forming them: singular values of one adapter, and how two are alike."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.store import to_json_value
from lora_kit.algebra.low_rank import LowRankUpdate, ThinSvd
from lora_kit.algebra.sources import AdapterLike, SourceAdapter, find_common_base
from lora_kit.errors import MergeError, format_list

_ROUNDING_SHARE: Final = 1e-6
"""A singular value below this share of the largest is rounding."""


@dataclass(frozen=True)
class Likeness:
    """How the updates D and D' of one layer are alike.

    Attributes:
        cosine: `⟨D, D'⟩ / (‖D‖ ‖D'‖)`, from -1 to 1.
        inputs, outputs: the overlap of the spaces they read and write (row and column spaces):
            `‖Uᵀ U'‖² / min(rank, rank')` of orthonormal bases, from 0 to 1 (Hu et al. 2021, arXiv 2106.09685, 7.2).
        norms: of D and D'.
    """

    cosine: float
    inputs: float
    outputs: float
    norms: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """How two adapters are alike.

    Attributes:
        cosine: of all updates together; layers that only one has count as zero in the other.
        layers: of the layers both have, by path.
        alone: layers that only the first, and only the second, has.
        configs: fields that differ, with both values.
        saved: of tensors of modules saved whole: `equal`, `different`, `only first` or `only second`.
    """

    cosine: float
    layers: Mapping[str, Likeness]
    alone: tuple[tuple[str, ...], tuple[str, ...]]
    configs: Mapping[str, tuple[Any, Any]]
    saved: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = to_json_value(self)
        return found


def spectrum(adapter: Adapter) -> dict[str, Tensor]:
    """The singular values of `scaling · B A` at every layer: float64, falling, one for each rank.

    Of a DoRA they are those of the update before its rows are rescaled.
    """
    own = SourceAdapter.of(adapter).updates()
    return {path: factors.values() for path, (_, factors) in own.items()}


def compare(one: AdapterLike, other: AdapterLike, *, allow: Collection[str] = ()) -> Comparison:
    """How two adapters of one base are alike.

    Args:
        one, other: folders, names in the store or Adapters.
        allow: `other-base`: adapters that were made for different bases; and what else `Adapter.load` allows.

    Raises:
        BaseMismatchError: they were made for different bases.
        MergeError: a DoRA, or a layer of different shapes.
        UnknownAdapterError, AdapterError: an adapter that is not there or cannot be read.
    """
    parents = [SourceAdapter.of(one, allow=allow), SourceAdapter.of(other, allow=allow)]
    for parent in parents:
        parent.check_linear("compared")
    find_common_base(parents, allow=allow)
    first, second = ({path: factors for path, (_, factors) in parent.updates().items()} for parent in parents)
    unfit = [path for path in first if path in second and first[path].shape != second[path].shape]
    if unfit:
        raise MergeError(f"layers of different shapes cannot be compared: {format_list(unfit)}", hint="is it one base?")
    layers = {path: _compare_layer(first[path], second[path]) for path in first if path in second}
    products = math.fsum(found.cosine * math.prod(found.norms) for found in layers.values())
    lengths = [math.sqrt(math.fsum(factors.norm() ** 2 for factors in own.values())) for own in (first, second)]
    a, b = (parent.adapter for parent in parents)
    return Comparison(
        cosine=_divide_or_zero(products, math.prod(lengths)),
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


def _drop_rounding_directions(found: ThinSvd) -> ThinSvd:
    """Without the directions that are nothing but rounding."""
    count = int((found.s > _ROUNDING_SHARE * found.s[0]).sum())
    return ThinSvd(found.u[:, :count], found.s[:count], found.vh[:count])


def _measure_overlap(one: Tensor, other: Tensor) -> float:
    """Of the spaces that two sets of orthonormal rows span."""
    return _divide_or_zero(float((one @ other.T).square().sum()), min(len(one), len(other)))


def _divide_or_zero(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _compare_configs(one: Adapter, other: Adapter) -> dict[str, tuple[Any, Any]]:
    first, second = one.config.to_dict(), other.config.to_dict()
    names = sorted(first.keys() | second.keys())
    return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}


def _compare_saved_modules(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, str]:
    def told(key: str) -> str:
        if key not in other:
            return "only first"
        if key not in one:
            return "only second"
        same = one[key].shape == other[key].shape and torch.equal(one[key], other[key].to(one[key].dtype))
        return "equal" if same else "different"

    return {key: told(key) for key in sorted(one.keys() | other.keys())}
