"""Tokens of several adapters in two products: the adapters' weights beside each other, of each token its own kept.

    y += ((x A) ⊙ M) B,   A (in, R), B (R, out), R the sum of the ranks, M (T, R) 1 where the token's adapter is

It reads every adapter's weights once, however many tokens use it, and copies them only when other adapters come. Where
the ranks add up to too many, tokens are padded instead (`padded_runs`). Weights are finite: reading an adapter makes
sure of that.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lora_kit.layers.row_gather import RowCache, RowSlot

MOST_JOINED_RANKS: Final = 64
"""Ranks of all adapters together, up to which their tokens are computed by all of them."""

Span = tuple["RowSlot | None", int, int]
"""What a run uses (None for the base), its first token, and the one after its last."""


@dataclass(frozen=True)
class JoinedWeights:
    """The weights of several adapters in one layer, beside each other.

    Attributes:
        row_slots: the adapters, in their order.
        a: (in, R), in the dtype of the activations. b: (R, out), likewise.
    """

    row_slots: tuple[RowSlot, ...]
    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class TokenColumns:
    """Which columns of the joined weights each token uses; the same for all layers in which its adapters are the same.

    Attributes:
        tokens: the range from the first one of an adapter to the last.
        others: bool (tokens, R): columns of other adapters.
        scaling: of the product; (R,) where the adapters' differ.
    """

    tokens: slice
    others: Tensor
    scaling: float | Tensor


def add_joined_(y: Tensor, x: Tensor, weights: JoinedWeights, columns: TokenColumns) -> None:
    """Add every token's update to y (T, out), from x (T, in)."""
    own, scaling = columns.tokens, columns.scaling
    if own.stop - own.start < x.shape[0]:
        y, x = y[own], x[own]
    h = (x @ weights.a).masked_fill_(columns.others, 0)
    if isinstance(scaling, Tensor):
        h, scaling = h * scaling, 1.0
    y.addmm_(h, weights.b, alpha=scaling)


def can_join(row_slots: Collection[RowSlot]) -> bool:
    """Return whether tokens of these adapters are better computed by all of them than padded."""
    return bool(row_slots) and sum(row_slot.rank for row_slot in row_slots) <= MOST_JOINED_RANKS


def join_weights(
    layer: nn.Module,
    cache: RowCache,
    row_slots: tuple[RowSlot, ...],
    stacked: tuple[Tensor, Tensor],
    dtype: torch.dtype,
) -> JoinedWeights | None:
    """Return the weights of adapters beside each other; None where the layer is asked for these the first time.

    What was joined before is used again as long as it holds them all and not many others. Where other adapters come
    with every step, joining costs more than it saves.

    Args:
        layer: whose weights these are.
        cache: of the thread.
        row_slots: the adapters, each once.
        stacked: the stacked weights (S, r, in) and (S, out, r).
        dtype: of the activations.
    """
    weights = cache.joined_weights.get(layer)
    if weights is not None and weights.a.dtype == dtype and _serves(weights.row_slots, row_slots):
        return weights
    if cache.asked_to_join.get(layer) != row_slots:
        cache.asked_to_join[layer] = row_slots
        return None
    weights = cache.joined_weights[layer] = _join_weights(row_slots, *stacked, dtype)
    return weights


def _serves(joined: tuple[RowSlot, ...], row_slots: tuple[RowSlot, ...]) -> bool:
    return joined == row_slots or (len(joined) <= 2 * len(row_slots) and set(row_slots) <= set(joined))


def _join_weights(row_slots: tuple[RowSlot, ...], a: Tensor, b: Tensor, dtype: torch.dtype) -> JoinedWeights:
    joined_a = torch.cat([a[slot, :rank].mT for slot, rank, _ in row_slots], 1).to(dtype)
    joined_b = torch.cat([b[slot, :, :rank].mT for slot, rank, _ in row_slots]).to(dtype)
    return JoinedWeights(row_slots, joined_a, joined_b)


def find_columns(
    row_slots: Sequence[RowSlot], spans: Sequence[Span], device: torch.device, dtype: torch.dtype
) -> TokenColumns:
    """Return which columns of joined weights each token of short runs uses."""
    used = [span for span in spans if span[0] is not None]
    start, end = used[0][1], used[-1][2]
    numbers = {row_slot: number for number, row_slot in enumerate(row_slots)}
    owners = [-1] * (end - start)
    for row_slot, first, last in used:
        assert row_slot is not None
        owners[first - start : last - start] = [numbers[row_slot]] * (last - first)
    columns = [number for number, row_slot in enumerate(row_slots) for _ in range(row_slot.rank)]
    others = torch.tensor(owners, device=device)[:, None] != torch.tensor(columns, device=device)
    scalings = [row_slot.scaling for row_slot in row_slots for _ in range(row_slot.rank)]
    is_one = len(set(scalings)) == 1
    scaling = scalings[0] if is_one else torch.tensor(scalings, device=device, dtype=dtype)
    return TokenColumns(slice(start, end), others, scaling)
