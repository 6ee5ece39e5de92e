"""`resize`: the nearest adapter of smaller ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_like import AdapterLike
from lora_kit.algebra.arguments import check_share, check_whole_number
from lora_kit.algebra.assemble import ErrorTally, assemble_adapter, build_record
from lora_kit.algebra.low_rank import LowRankUpdate, find_smallest_rank
from lora_kit.algebra.sources import SourceAdapter, describe_sources
from lora_kit.errors import ConfigError

_BYTES_PER_VALUE: Final = 4
"""A saved value is float32."""


def resize(
    adapter: AdapterLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    bytes: int | None = None,
    allow: Collection[str] = (),
) -> Adapter:
    """Return the nearest adapter of smaller ranks: at every layer the best approximation of its update.

    The singular values are those of `scaling · B A`, through QR of the factors. A layer that keeps its rank keeps its
    factors; `modules_to_save` stay as they are. What is lost is recorded (`record["made"]["error"]`).

    Args:
        adapter: a folder, a name in the store or an Adapter.
        rank: of every layer, at most.
        energy: the share of `‖update‖²` that each layer keeps at least, above 0 to 1, in as few ranks as that takes.
        bytes: of all tensors, at most. Ranks go where they keep most for their size.
        allow: what `Adapter.load` allows.

    Raises:
        ConfigError: not exactly one of rank, energy and bytes is given, or it is invalid, or rank 1 takes more bytes.
        MergeError: the adapter is a DoRA.
        UnknownAdapterError, AdapterError: it is not there or cannot be read.
    """
    limits = _check_limits(rank, energy, bytes)
    source = SourceAdapter.of(adapter, allow=allow)
    source.check_linear("resized")
    before, saved = source.updates(), source.adapter.saved()
    if not before:
        raise ConfigError(f"{source.name!r} has no LoRA weights: there is nothing to resize")
    factors = {path: update for path, (_, update) in before.items()}
    if rank is not None:
        ranks = dict.fromkeys(factors, rank)
    elif energy is not None:
        ranks = {path: _choose_rank(update, energy) for path, update in factors.items()}
    else:
        assert bytes is not None
        ranks = _spend_bytes(bytes - sum(tensor.nbytes for tensor in saved.values()), factors)
    updates, error = {}, ErrorTally()
    for path, (kind, update) in before.items():
        resized = update if ranks[path] >= update.rank else update.svd().best(ranks[path])
        error.compare(path, resized, update)
        updates[path] = kind, resized
    provenance = {"by": "resize", **limits, "parents": describe_sources([source]), "error": error.to_json()}
    record = build_record([source], source.adapter.base, provenance)
    return assemble_adapter(source.adapter.config, updates, saved, record=record)


def _check_limits(rank: int | None, energy: float | None, bytes: int | None) -> dict[str, float]:
    """Return the one limit that was given, by its name."""
    limits = {"rank": rank, "energy": energy, "bytes": bytes}
    given = {name: value for name, value in limits.items() if value is not None}
    if len(given) != 1:
        raise ConfigError(f"{len(given)} of rank, energy and bytes were given", hint="exactly one is expected")
    for name, value in given.items():
        (check_share if name == "energy" else check_whole_number)(name, value)
    return given


def _choose_rank(update: LowRankUpdate, energy: float) -> int:
    """Return the smallest rank that keeps this share of `‖update‖²`."""
    squares = update.values().square()
    return find_smallest_rank(squares, energy * float(squares.sum()))


def _spend_bytes(limit: int, factors: Mapping[str, LowRankUpdate]) -> dict[str, int]:
    """Return ranks whose LoRA weights take at most so many bytes: 1 each, then what keeps most `‖update‖²` per byte.

    A layer's singular values fall, so its own are taken in their order.
    """
    cost = {path: _BYTES_PER_VALUE * sum(update.shape) for path, update in factors.items()}
    squares = {path: update.values().square() for path, update in factors.items()}
    left = limit - sum(cost.values())
    if left < 0:
        raise ConfigError(f"rank 1 everywhere takes {-left:,} bytes more than were given", hint="give more bytes")
    gains = [(float(square) / cost[path], path) for path, own in squares.items() for square in own[1:]]
    ranks, full = dict.fromkeys(cost, 1), set[str]()
    for _, path in sorted(gains, key=lambda gain: -gain[0]):
        if path not in full and cost[path] <= left:
            left -= cost[path]
            ranks[path] += 1
        else:
            full.add(path)
    return ranks
