"""Tokens of many adapters in two batched products: each adapter's tokens together, padded to as many as the most has.

    y_t += s · x_t A_g B_g,   as (G, m, in) (G, in, r) (G, r, out),   the tokens t of each adapter g

Weights are read where they are if the adapters' slots lie close together. An adapter with many more tokens than the
others is there several times, so that these are not padded to its number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from lora_kit.layers.row_gather import RowSelection, as_index, make_index, make_scaling, split_by_rank

if TYPE_CHECKING:
    from lora_kit.layers.joined_runs import Span
    from lora_kit.layers.row_gather import RowSlot

_MOST_PADDING: Final = 2
"""Places of an adapter, for each token that adapters have on average, from which on it is there several times."""
_LEAST_PLACES: Final = 4
_MOST_SLOTS: Final = 2
"""Slots from the first to the last, for each adapter, up to which those between are computed too instead of copied."""


@dataclass(frozen=True)
class PaddedTokens:
    """Which adapter computes which tokens; the same for all layers in which these adapters are the same.

    Attributes:
        selection: the weights of each group, and in `rows` the token at each of its places, int64 (G · m,).
        groups: G.
        tokens: a range, or their indices (T',) int64.
        places: of each of these tokens, int64 (T',).
    """

    selection: RowSelection
    groups: int
    tokens: slice | Tensor
    places: Tensor

    def add_(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> None:
        """Add these tokens' updates to y (T, out), from x (T, in), with a (G, in, r) and b (G, r, out)."""
        rows, scaling = self.selection.rows, self.selection.scaling
        assert isinstance(rows, Tensor)
        h = torch.bmm(x.index_select(0, rows).view(self.groups, -1, x.shape[1]), a)
        if isinstance(scaling, Tensor):
            h, scaling = (h * scaling).to(h.dtype), 1.0
        update = torch.bmm(h, b).view(-1, y.shape[1]).index_select(0, self.places)
        if isinstance(self.tokens, slice):
            y[self.tokens].add_(update, alpha=scaling)
        else:
            y.index_add_(0, self.tokens, update, alpha=scaling)


def pad_runs(spans: Sequence[Span], device: torch.device) -> list[PaddedTokens]:
    """Return how the tokens of some runs are computed: together, or apart where ranks differ much."""
    owners = {token: owner for owner, start, end in spans if owner is not None for token in range(start, end)}
    return [_pad(part, device) for part in split_by_rank(owners)]


def _pad(owners: Mapping[int, RowSlot], device: torch.device) -> PaddedTokens:
    pieces = _divide(owners)
    slots = [owner.slot for owner, _ in pieces]
    chosen: slice | Tensor = slice(slots[0], slots[-1] + 1)
    count = slots[-1] + 1 - slots[0]
    groups = [slot - slots[0] for slot in slots]
    if len(set(slots)) < len(slots) or count > _MOST_SLOTS * len(slots):
        chosen, count, groups = make_index(slots, device), len(slots), list(range(len(slots)))
    width = max(len(own) for _, own in pieces)
    rows, places = [next(iter(owners))] * (count * width), dict[int, int]()
    scalings = [pieces[0][0].scaling] * count  # what those between have does not matter
    for group, (owner, own) in zip(groups, pieces, strict=True):
        scalings[group] = owner.scaling
        for place, token in enumerate(own, group * width):
            rows[place], places[token] = token, place
    selection = RowSelection(
        rows=make_index(rows, device),
        slots=chosen,
        rank=max(owner.rank for owner in owners.values()),
        scaling=make_scaling(scalings, device),
    )
    return PaddedTokens(
        selection, count, as_index(list(owners), device), make_index([places[token] for token in owners], device)
    )


def _divide(owners: Mapping[int, RowSlot]) -> list[tuple[RowSlot, list[int]]]:
    """Return the tokens of each adapter by slot, in pieces of which none is much longer than the average."""
    by_owner: dict[RowSlot, list[int]] = {}
    for token, owner in owners.items():
        by_owner.setdefault(owner, []).append(token)
    most = max(_LEAST_PLACES, _MOST_PADDING * math.ceil(len(owners) / len(by_owner)))
    return [
        (owner, own[start : start + most])
        for owner, own in sorted(by_owner.items())
        for start in range(0, len(own), most)
    ]
