"""The LoRA weights of a batch's rows, gathered from a layer's stacked weights once for every forward of one routing.

Without gradients, and without kernels that read stacked weights by slot, a forward would gather each row's A and B
again for every token that is generated, which costs more than the products do. Rows that use the base are left out, and
rows of much lower rank than the others form a group of their own, so that they do not pay for the highest rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lora_kit.layers.experts import ExpertFactors
    from lora_kit.layers.joined_runs import JoinedWeights
    from lora_kit.layers.token_runs import RunShape


class RowSlot(NamedTuple):
    """What one row of a batch uses.

    Attributes:
        slot: index into the stacked weights.
        rank: of the LoRA weights there.
        scaling: of their product.
    """

    slot: int
    rank: int
    scaling: float


@dataclass
class RowGroup:
    """Some rows of a batch with their LoRA weights.

    Attributes:
        rows: which: a range, or their indices (R',) int64; None for all of them.
        a: (R', in, r), in the dtype of the activations.
        b: (R', r, out), in the same dtype.
        scaling: one number, or (R', 1, 1) where the rows' differ.
    """

    rows: slice | Tensor | None
    a: Tensor
    b: Tensor
    scaling: float | Tensor

    def add_(self, y: Tensor, x: Tensor) -> None:
        """Add y += scaling · x A B for these rows.

        Args:
            y: (R, T, out), overwritten. x: (R, T, in) in the dtype of y.
        """
        rows, alpha = self.rows, 1.0
        chosen = x.index_select(0, rows) if isinstance(rows, Tensor) else x if rows is None else x[rows]
        h = torch.bmm(chosen, self.a)
        if isinstance(self.scaling, Tensor):
            h = (h * self.scaling).to(h.dtype)
        else:
            alpha = self.scaling  # as a part of the last product it costs nothing
        if isinstance(rows, Tensor):
            y.index_add_(0, rows, torch.bmm(h, self.b), alpha=alpha)
        else:
            (y if rows is None else y[rows]).baddbmm_(h, self.b, alpha=alpha)


@dataclass(frozen=True)
class RowSelection:
    """Rows that are computed together, and which stacked weights they use.

    Attributes:
        rows: as in `RowGroup`.
        slots: one per row: a range, or their indices (R',) int64.
        rank: the highest of theirs.
        scaling: as in `RowGroup`.
    """

    rows: slice | Tensor | None
    slots: slice | Tensor
    rank: int
    scaling: float | Tensor


class RowCache:
    """What layers prepared for the rows of a batch, to use it in every forward until other rows come.

    Attributes:
        selections: by device and what each row uses; shared by all layers in which that is the same.
        groups: of a linear layer: the dtype of the activations, and the groups.
        token_changes: of a token table: row - base's row (R, k, d), and the token of each (R, k).
        expert_factors: of a parameter: slots and dtype, and the factors.
        run_shapes: by tokens, adapters and device; shared by layers in which these are the same.
        padded_weights: (G, in, r) and (G, r, out) of a linear layer that is given so many tokens, for padded runs.
        slot_copies: LoRA weights (in, r) and (r, out) of a slot of a layer, in the dtype of the activations.
        slot_views: the same where nothing is copied; other rows may use them, too.
        joined_weights: of a linear layer, for the adapters of short runs; other rows may use them, too.
        asked_to_join: the adapters that a linear layer had in short runs, when its weights were not joined.
    """

    def __init__(self) -> None:
        self.selections: dict[tuple[torch.device, tuple[RowSlot | None, ...]], list[RowSelection]] = {}
        self.groups: dict[nn.Module, tuple[torch.dtype, list[RowGroup]]] = {}
        self.token_changes: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.run_shapes: dict[object, RunShape] = {}
        self.padded_weights: dict[tuple[nn.Module, int, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
        self.slot_copies: dict[tuple[nn.Module, int, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.slot_views: dict[tuple[nn.Module, int, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.joined_weights: dict[nn.Module, JoinedWeights] = {}
        self.asked_to_join: dict[nn.Module, tuple[RowSlot, ...]] = {}
        self.expert_factors: dict[nn.Module, tuple[tuple[tuple[int, ...], torch.dtype], ExpertFactors]] = {}

    def clear_rows(self) -> None:
        """Drop what was prepared for rows, because other rows come."""
        self.selections.clear()
        self.groups.clear()
        self.token_changes.clear()
        self.run_shapes.clear()
        self.padded_weights.clear()
        self.slot_copies.clear()


class GatherBuffer:
    """Memory for gathered LoRA weights, used again from one routing to the next.

    With fresh memory each time, half of a first forward's extra cost was the kernel's: pages to map, also for
    activations, since what is kept between them leaves the heap in pieces.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def gather(self, name: str, stacked: Tensor, selection: RowSelection, dtype: torch.dtype) -> Tensor:
        """Return (R', rank, features) of stacked weights (S, r, features): a view of a range of slots, else a copy.

        A copy stays in this buffer under the name, until the name is used again.
        """
        if selection.rank < stacked.shape[1]:
            stacked = stacked[:, : selection.rank]
        if isinstance(selection.slots, slice):
            view = stacked[selection.slots]
            return view if view.dtype == dtype else self._allocate(name, view.shape, dtype, view.device).copy_(view)
        shape = (len(selection.slots), *stacked.shape[1:])
        memory = self._allocate(name, shape, dtype, stacked.device)
        if dtype != stacked.dtype:
            return memory.copy_(stacked.index_select(0, selection.slots))
        return torch.index_select(stacked, 0, selection.slots, out=memory)

    def _allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        memory, size = self._memory.get(name), math.prod(shape)
        if memory is None or memory.numel() < size or (memory.dtype, memory.device) != (dtype, device):
            # Memory made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                memory = self._memory[name] = torch.empty(size, dtype=dtype, device=device)
        return memory[:size].view(shape)


def select_row_groups(row_slots: Sequence[RowSlot | None], device: torch.device) -> list[RowSelection]:
    """Split a batch into at most two groups; the result is the same for all layers in which its rows use the same.

    Args:
        row_slots: what each row uses; None for the base.
    """
    adapted = {row: row_slot for row, row_slot in enumerate(row_slots) if row_slot is not None}
    return [_select_rows(rows, len(row_slots), device) for rows in split_by_rank(adapted)]


def gather_row_groups(
    a: Tensor, b: Tensor, selections: Sequence[RowSelection], dtype: torch.dtype, buffer: GatherBuffer
) -> list[RowGroup]:
    """Gather the LoRA weights of each group of a batch.

    Args:
        a: (S, r, in). b: (S, out, r). Stacked weights, in memory the rank before the features.
        dtype: of the activations.
    """
    weights = gather_weights(a, b, selections, dtype, buffer)
    return [
        RowGroup(selection.rows, *own, selection.scaling) for selection, own in zip(selections, weights, strict=True)
    ]


def gather_weights(
    a: Tensor, b: Tensor, selections: Sequence[RowSelection], dtype: torch.dtype, buffer: GatherBuffer
) -> list[tuple[Tensor, Tensor]]:
    """Return (R', in, r) and (R', r, out) of each selection; arguments as in `gather_row_groups`."""
    return [
        (
            buffer.gather(f"a{number}", a, selection, dtype).mT,
            buffer.gather(f"b{number}", b.mT, selection, dtype),
        )
        for number, selection in enumerate(selections)
    ]


def split_by_rank(rows: dict[int, RowSlot]) -> list[dict[int, RowSlot]]:
    """Return rows or tokens in one group, or in two where the highest rank for all is half as much work again."""
    ranks = [row_slot.rank for row_slot in rows.values()]
    if not rows or 2 * max(ranks) * len(ranks) <= 3 * sum(ranks):
        return [rows] if rows else []
    high = max(ranks)
    # The cheapest split: each group pays its own highest rank.
    bound = min(set(ranks) - {high}, key=lambda low: sum(low if rank <= low else high for rank in ranks))
    low = {row: row_slot for row, row_slot in rows.items() if row_slot.rank <= bound}
    return [low, {row: row_slot for row, row_slot in rows.items() if row not in low}]


def _select_rows(rows: dict[int, RowSlot], count: int, device: torch.device) -> RowSelection:
    slots, ranks, scalings = zip(*rows.values(), strict=True)
    return RowSelection(
        rows=None if len(rows) == count else as_index(list(rows), device),
        slots=as_index(slots, device),
        rank=max(ranks),
        scaling=make_scaling(scalings, device),
    )


def make_scaling(scalings: Sequence[float], device: torch.device) -> float | Tensor:
    """Return one number, or (R', 1, 1) where they differ."""
    if len(set(scalings)) == 1:
        return scalings[0]
    with torch.inference_mode(False):
        return torch.tensor(scalings, device=device).view(-1, 1, 1)


def as_index(numbers: Sequence[int], device: torch.device) -> slice | Tensor:
    """Return numbers as an index: a range where they are consecutive."""
    if list(numbers) == list(range(numbers[0], numbers[0] + len(numbers))):
        return slice(numbers[0], numbers[-1] + 1)
    return make_index(numbers, device)


def make_index(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Return numbers as int64 that forwards with gradients may use, too."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


class Workspace:
    """What the layers prepared in one thread, for the rows that it computed last.

    Threads that compute at once may share a route, so this belongs to the thread and not to the route.

    Attributes:
        rows: `cache_key` of the last route that has one.
        version: of the weights that the cache was made from.
        cache: what layers prepared.
        buffer: memory for LoRA weights that one layer gathers for one forward.
        layer_buffers: memory for those that a layer gathers for many forwards.
    """

    def __init__(self) -> None:
        self.rows: tuple[object, ...] = ()
        self.version = 0
        self.cache = RowCache()
        self.buffer = GatherBuffer()
        self.layer_buffers: dict[nn.Module, GatherBuffer] = {}
