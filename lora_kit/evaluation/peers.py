"""Processes that measure the same model together: each does some of the batches, and all get every result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, Protocol, TypeVar

T = TypeVar("T")
Key = TypeVar("Key")


class Peers(Protocol):
    """The processes, as one of them sees them.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank: int
    size: int

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in their order."""


class _NoPeers:
    """A process alone."""

    rank, size = 0, 1

    def gather(self, value: T) -> list[T]:
        return [value]


NO_PEERS: Final[Peers] = _NoPeers()


def share_work(items: Iterable[T], peers: Peers) -> Iterator[tuple[int, T]]:
    """Yield the items that this process does, with their numbers."""
    return ((number, item) for number, item in enumerate(items) if number % peers.size == peers.rank)


def merge_results(results: Mapping[Key, T], peers: Peers) -> dict[Key, T]:
    """Return the results of all processes by their keys."""
    return {key: value for each in peers.gather(dict(results)) for key, value in each.items()}


def average_batches(measured: Mapping[int, Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """Return the weighted means of metrics over batches, each a value and its weight, in the order of the batches."""
    sums, weights = defaultdict[str, float](float), defaultdict[str, float](float)
    for number in sorted(measured):
        for name, (value, weight) in measured[number].items():
            sums[name] += value * weight
            weights[name] += weight
    return {name: sums[name] / weights[name] for name in sums}
