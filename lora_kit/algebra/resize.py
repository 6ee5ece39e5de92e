"""`resize`: the same update in fewer ranks, nothing lost that need not be."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from torch import Tensor

from lora_kit.adapter.adapter import Adapter
from lora_kit.algebra.assemble import ErrorTally, assemble_adapter, build_record
from lora_kit.algebra.low_rank import LowRankUpdate, find_smallest_rank
from lora_kit.algebra.sources import AdapterLike, SourceAdapter, describe_sources
from lora_kit.errors import ConfigError

_BYTES_PER_VALUE: Final = 4
"""Bytes of a value as it is saved."""


def resize(
    adapter: AdapterLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    bytes: int | None = None,
    allow: Collection[str] = (),
) -> Adapter:
    """The nearest adapter of smaller ranks: at every layer the best approximation of its update there is.

    The singular values are those of `scaling · B A`, through QR of the factors. A layer that keeps its rank keeps its
    factors; modules saved whole stay as they are. What is lost is recorded (`record["made"]["error"]`).

    Args:
        adapter: a folder, a name in the store or an Adapter.
        rank: of every layer, at most.
        energy: the share of `‖update‖²` that each layer keeps at least, above 0 to 1, in as few ranks as that takes.
        bytes: of all tensors, at most. Ranks go where they keep most for their size.
        allow: what `Adapter.load` allows.

    Raises:
        ConfigError: not exactly one of rank, energy and bytes; or one that is none, or fewer bytes than rank 1 takes.
        MergeError: a DoRA.
        UnknownAdapterError, AdapterError: an adapter that is not there or cannot be read.
    """
    asked = _parse_limit({"rank": rank, "energy": energy, "bytes": bytes})
    parent = SourceAdapter.of(adapter, allow=allow)
    parent.check_linear("resized")
    own = parent.updates()
    if not own:
        raise ConfigError(f"{parent.name!r} has no low-rank pairs: there is nothing to resize")
    ranks = _choose_ranks(asked, {path: factors for path, (_, factors) in own.items()}, parent.adapter.saved())
    updates, error = {}, ErrorTally()
    for path, (kind, factors) in own.items():
        made = factors if ranks[path] >= factors.rank else factors.svd().best(ranks[path])
        error.compare(path, made, factors)
        updates[path] = kind, made
    made_by = {"by": "resize", **asked, "parents": describe_sources([parent]), "error": error.to_json()}
    record = build_record([parent], parent.adapter.base, made_by)
    return assemble_adapter(parent.adapter.config, updates, parent.adapter.saved(), record=record)


def _choose_ranks(
    asked: Mapping[str, Any], own: Mapping[str, LowRankUpdate], saved: Mapping[str, Tensor]
) -> dict[str, int]:
    """The rank of every layer, at most."""
    if "rank" in asked:
        return dict.fromkeys(own, asked["rank"])
    squares = {path: factors.values().square() for path, factors in own.items()}
    if "energy" in asked:
        return {
            path: find_smallest_rank(parts, asked["energy"] * float(parts.sum())) for path, parts in squares.items()
        }
    cost = {path: _BYTES_PER_VALUE * sum(factors.shape) for path, factors in own.items()}
    return _spend_bytes(asked["bytes"] - sum(tensor.nbytes for tensor in saved.values()), cost, squares)


def _parse_limit(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, the one thing of it."""
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) != 1:
        raise ConfigError(f"{len(given)} of rank, energy and bytes were given", hint="exactly one is expected")
    ((name, value),) = given.items()
    whole = isinstance(value, int) and not isinstance(value, bool)
    if name == "energy":
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise ConfigError(f"energy={value!r} was given; a number above 0 up to 1 is expected")
    elif not whole or value < 1:
        raise ConfigError(f"{name}={value!r} was given; a whole number from 1 is expected")
    return given


def _spend_bytes(limit: int, cost: Mapping[str, int], squares: Mapping[str, Tensor]) -> dict[str, int]:
    """Ranks whose pairs fit into so many bytes: one each, then what keeps most of `‖update‖²` for its size.

    A layer's singular values fall, so that taking the best for its size first takes each layer's in their order.

    Args:
        cost: bytes of one rank at each layer. squares: of its singular values.
    """
    left = limit - sum(cost.values())
    if left < 0:
        raise ConfigError(f"rank 1 everywhere takes {-left:,} bytes more than were given")
    gains = [(float(part) / cost[path], path) for path, parts in squares.items() for part in parts[1:]]
    ranks, full = dict.fromkeys(cost, 1), set[str]()
    for _, path in sorted(gains, key=lambda gain: -gain[0]):
        if path not in full and cost[path] <= left:
            left -= cost[path]
            ranks[path] += 1
        else:
            full.add(path)
    return ranks
