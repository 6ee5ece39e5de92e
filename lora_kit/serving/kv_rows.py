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
_MOST_SPAN: Final = 2.5
"""Rows from the first generating one to the last, for each that generates, up to which they are read where they are."""
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


class PackedStep:
    """Where the tokens of a packed forward belong: one token for each of `rows`, then the chunks.

    Args:
        memory: keys and values.
        rows: of the requests that are generating, each once.
        positions: of their tokens, as many.
        chunks: of prompts.
        device: of the model.

    Attributes:
        rows, positions: int64 (generating,).
        reader: how the generating tokens read their rows.
    """

    def __init__(
        self,
        memory: KeyValueRows,
        rows: Sequence[int],
        positions: Sequence[int],
        chunks: Sequence[PromptChunk],
        device: torch.device,
    ) -> None:
        self.memory, self.chunks = memory, chunks
        self.rows = torch.tensor(rows, dtype=torch.int64, device=device)
        self.positions = torch.tensor(positions, dtype=torch.int64, device=device)
        self.reader = RowReader(rows, positions, device) if rows else None


class RowReader:
    """What a token of each generating row attends to.

    Keys and values are read where they are, also those of the rows between, which nothing asks for: copying a row costs
    more than attending to another one. Where too many lie between, the rows are copied.

    Args:
        rows, positions, device: as of a `PackedStep`, one row or more.
    """

    def __init__(self, rows: Sequence[int], positions: Sequence[int], device: torch.device) -> None:
        first, end = min(rows), max(rows) + 1
        self.longest = max(positions) + 1
        """Positions that are read, at most."""
        self._span = slice(first, end) if end - first <= _MOST_SPAN * len(rows) else None
        self._has_others = self._span is not None and list(rows) != list(range(first, end))
        begin = 0 if self._span is None else first
        self._rows = torch.tensor([row - begin for row in rows], device=device)
        ends = torch.tensor(positions, device=device)
        if self._has_others:
            ends = ends.new_zeros(end - first).index_copy_(0, self._rows, ends)  # a row between sees its first position
        self._ends = ends
        self._masks: dict[int | None, Tensor] = {}

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, window: int | None) -> Tensor:
        """Return (generating, heads, width).

        Args:
            query: (heads, generating, width).
            keys, values: of the layer, (rows, heads of keys, positions, width).
            scaling, window: see `attend_rows`.
        """
        heads, count, _ = query.shape
        own_keys, own_values = (self._read(kept[:, :, : self.longest]) for kept in (keys, values))
        # Heads that share keys are one matrix of queries. (generating, heads of keys, heads each, width)
        grouped = self._spread(query.transpose(0, 1).reshape(count, keys.shape[1], -1, query.shape[2]))
        attended = functional.scaled_dot_product_attention(
            grouped, own_keys, own_values, attn_mask=self._get_mask(window), scale=scaling
        )
        return self._pick(attended).reshape(count, heads, -1)

    def _read(self, kept: Tensor) -> Tensor:
        return kept.index_select(0, self._rows) if self._span is None else kept[self._span]

    def _spread(self, query: Tensor) -> Tensor:
        if not self._has_others:
            return query
        return query.new_zeros(len(self._ends), *query.shape[1:]).index_copy_(0, self._rows, query)

    def _pick(self, attended: Tensor) -> Tensor:
        return attended.index_select(0, self._rows) if self._has_others else attended

    def _get_mask(self, window: int | None) -> Tensor:
        """Return which positions each row sees, (rows read, 1, 1, longest); the same for all layers of a step."""
        if window not in self._masks:
            self._masks[window] = _make_mask(self._ends, self.longest, window)[:, None, None]
        return self._masks[window]


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
    if step.reader is not None:
        keys[step.rows, :, step.positions] = key[0, :, :count].transpose(0, 1)
        values[step.rows, :, step.positions] = value[0, :, :count].transpose(0, 1)
        out[:count] = step.reader.attend(query[0, :, :count], keys, values, scaling, sliding_window)
    for chunk in step.chunks:
        out[chunk.offset : chunk.offset + chunk.count] = _attend_chunk(
            query, key, value, keys, values, chunk, scaling, sliding_window
        )
    return out.unsqueeze(0), None


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
