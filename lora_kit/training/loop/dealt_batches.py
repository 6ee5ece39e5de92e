"""The batches of a training dealt to its processes: each takes a share of every batch, in the order of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from lora_kit.training.loop.world import World

_KEPT_OPTIONS = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)


class DealtBatches(Sampler[list[int]]):
    """The share of this process in the batches of a sampler, which is asked in the first process only.

    Of n rows a process takes n // size, the first ones one more: of a short batch it may have none.

    Args:
        batches: yields the rows of a batch for all processes.
        world: the processes.
    """

    def __init__(self, batches: Iterable[list[int]], world: World) -> None:
        self._batches, self._world = batches, world

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._world.ask_first(lambda: list(self._batches)):
            yield take_share(batch, self._world)

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    @property
    def batch_sampler(self) -> DealtBatches:
        """This object: transformers sets the epoch of what lies behind the sampler of a loader."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Pass on the number of the epoch, on which the order of rows may depend."""
        for part in (self._batches, getattr(self._batches, "sampler", None)):
            advance = getattr(part, "set_epoch", None)
            if advance is not None:
                advance(epoch)


def take_share(rows: Sequence[Any], world: World) -> list[Any]:
    """Return the rows of this process, of all rows in their order."""
    each, more = divmod(len(rows), world.size)
    start = world.rank * each + min(world.rank, more)
    return list(rows[start : start + each + (world.rank < more)])


def deal_batches(loader: DataLoader[Any], world: World) -> DataLoader[Any]:
    """Return a loader of this process's share in the batches of another; a share without rows is an empty mapping."""
    assert loader.collate_fn is not None
    options: dict[str, Any] = {name: getattr(loader, name) for name in _KEPT_OPTIONS}
    return DataLoader(
        loader.dataset,
        batch_sampler=DealtBatches(loader.batch_sampler, world),  # type: ignore[arg-type]
        collate_fn=_CollateRows(loader.collate_fn),
        **options,
    )


class _CollateRows:
    """Joins rows into a batch; no rows into an empty one. A class, so that a worker process can be given it."""

    def __init__(self, collate: Callable[[list[Any]], Mapping[str, torch.Tensor]]) -> None:
        self._collate = collate

    def __call__(self, rows: list[Any]) -> Mapping[str, torch.Tensor]:
        return self._collate(rows) if rows else {}
