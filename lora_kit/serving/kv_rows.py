"""Keys and values of running requests, a row each, and the attention that reads them in a packed forward.

A packed forward is one row of tokens, (1, T): one token for each request that is generating, then chunks of prompts. It
goes through public pieces of transformers alone: a model gets the name of an attention function and of a mask
function, and hands keyword arguments through to the former.

    o_t = softmax(s · q_t K[row(t), : p(t) + 1]ᵀ) V[row(t), : p(t) + 1],   p(t) the position of token t in its row
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

ATTENTION: Final = "lora_kit_rows"
"""The name under which transformers knows this attention, and its masks."""
_HARMLESS_OPTIONS: Final = frozenset({"position_ids", "is_causal", "cache_position", "output_attentions", "use_cache"})
"""Keyword arguments of an attention that change nothing here: a packed forward is causal by its positions."""


@dataclass
class KeyValueRows:
    """Keys and values: for each layer (rows, heads of keys, positions, width), allocated when a layer is first seen.

    Attributes:
        rows: how many requests can run at once.
        positions: tokens of a row, at most.
        keys, values: by index of a layer.
    """

    rows: int
    positions: int
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def of_layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of a layer, whose own are (1, heads, tokens, width) each."""
        if index not in self.keys:
            for kept, like in ((self.keys, key), (self.values, value)):
                kept[index] = like.new_zeros(self.rows, like.shape[1], self.positions, like.shape[3])
        return self.keys[index], self.values[index]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of a row into another."""
        for kept in (*self.keys.values(), *self.values.values()):
            kept[target, :, :length] = kept[source, :, :length]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers so far."""
        return sum(kept.nbytes for kept in (*self.keys.values(), *self.values.values()))


@dataclass(frozen=True)
class PromptChunk:
    """Consecutive tokens of one prompt in a packed forward.

    Attributes:
        row: of the request.
        start: position of the first one.
        count: how many.
        offset: where they begin in the forward.
    """

    row: int
    start: int
    count: int
    offset: int


@dataclass(frozen=True)
class PackedStep:
    """Where the tokens of a packed forward belong: one token for each of `rows`, then the chunks.

    Attributes:
        memory: keys and values.
        rows: int64 (generating,).
        positions: of their tokens, int64 (generating,).
        chunks: of prompts.
    """

    memory: KeyValueRows
    rows: Tensor
    positions: Tensor
    chunks: Sequence[PromptChunk]

    @property
    def longest(self) -> int:
        """Positions that a generating row reads, at most."""
        return int(self.positions.max()) + 1 if len(self.positions) else 0


def register_attention() -> None:
    """Make `ATTENTION` known to transformers; registering again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, attend_rows)
    AttentionMaskInterface.register(ATTENTION, _make_no_mask)


def _make_no_mask(*arguments: Any, **options: Any) -> None:
    """Return no mask: `attend_rows` makes those of its rows itself."""


def attend_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    lora_kit_step: PackedStep,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Write the keys and values of a packed forward into their rows, and return what its tokens attend to.

    Args:
        module: the attention, with its `layer_idx`.
        query: (1, heads, T, width).
        key, value: (1, heads of keys, T, width).
        lora_kit_step: where the tokens belong.
        scaling: of the products; None for 1 / √width.
        sliding_window: how many positions a token sees, its own among them; None for all before it.

    Returns:
        (1, T, heads, width), and no weights.

    Raises:
        NotImplementedError: the model asks for something else than plain causal attention.
    """
    unknown = [name for name, given in options.items() if given is not None and name not in _HARMLESS_OPTIONS]
    if unknown or dropout or attention_mask is not None:
        raise NotImplementedError(f"attention with {', '.join(unknown) or 'a mask or dropout'}")
    step, index = lora_kit_step, int(module.layer_idx)  # type: ignore[arg-type]
    keys, values = step.memory.of_layer(index, key, value)
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    count = len(step.rows)
    if count:
        keys[step.rows, :, step.positions] = key[0, :, :count].transpose(0, 1)
        values[step.rows, :, step.positions] = value[0, :, :count].transpose(0, 1)
        out[:count] = _attend_generating(query[0, :, :count], keys, values, step, scaling, sliding_window)
    for chunk in step.chunks:
        out[chunk.offset : chunk.offset + chunk.count] = _attend_chunk(
            query, key, value, keys, values, chunk, scaling, sliding_window
        )
    return out.unsqueeze(0), None


def _attend_generating(
    query: Tensor, keys: Tensor, values: Tensor, step: PackedStep, scaling: float | None, window: int | None
) -> Tensor:
    """Return (generating, heads, width) for one token of each row; `query` is (heads, generating, width)."""
    longest, groups = step.longest, keys.shape[1]
    own_keys = keys[:, :, :longest].index_select(0, step.rows)
    own_values = values[:, :, :longest].index_select(0, step.rows)
    count, width = query.shape[1], query.shape[2]
    grouped = query.transpose(0, 1).reshape(count, groups, -1, width)
    mask = _make_mask(step.positions, longest, window)[:, None, None]
    attended = functional.scaled_dot_product_attention(grouped, own_keys, own_values, attn_mask=mask, scale=scaling)
    return attended.reshape(count, query.shape[0], -1)


def _attend_chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    chunk: PromptChunk,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Return (count, heads, width) for a chunk of a prompt, whose keys and values are written first."""
    own, end = slice(chunk.offset, chunk.offset + chunk.count), chunk.start + chunk.count
    keys[chunk.row, :, chunk.start : end] = key[0, :, own]
    values[chunk.row, :, chunk.start : end] = value[0, :, own]
    is_plain = chunk.start == 0 and (window is None or end <= window)
    mask = None if is_plain else _make_mask(torch.arange(chunk.start, end, device=query.device), end, window)
    attended = functional.scaled_dot_product_attention(
        query[:, :, own],
        keys[chunk.row : chunk.row + 1, :, :end],
        values[chunk.row : chunk.row + 1, :, :end],
        attn_mask=mask,
        is_causal=is_plain,
        scale=scaling,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1)


def _make_mask(positions: Tensor, length: int, window: int | None) -> Tensor:
    """Return which of `length` positions each token sees: bool (tokens, length)."""
    seen = torch.arange(length, device=positions.device)
    mask = seen <= positions[:, None]
    return mask if window is None else mask & (seen > positions[:, None] - window)
