"""A packed forward of rows of several adapters, (1, T), in which attention stays inside the rows of each.

Everything but attention computes tokens by themselves, so rows of any lengths lie one after another. What mixes tokens
is computed adapter by adapter, with the shapes and the masks that it would have alone, and so with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from lora_kit.training.together.process_state import RandomStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION: Final = "lora_kit_together"
"""The name under which transformers knows this attention, and its masks."""
INNER_ATTENTION: Final = "sdpa"
"""The attention that computes the rows of each adapter."""


@dataclass(frozen=True)
class RowBlock:
    """The rows of one adapter in a packed forward.

    Attributes:
        owner: the body of the adapter's model, whose layers compute what is not shared.
        inputs: of that body: `input_ids` and perhaps `attention_mask`, `position_ids` and `token_type_ids`, each (rows,
            length).
        stream: where its random numbers are drawn from.
    """

    owner: nn.Module
    inputs: Mapping[str, Tensor]
    stream: RandomStream

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows, and their length."""
        rows, length = self.inputs["input_ids"].shape
        return rows, length

    @property
    def tokens(self) -> int:
        """Number of tokens, padding included."""
        return self.inputs["input_ids"].numel()

    @property
    def positions(self) -> Tensor:
        """Position of each token: int64 (rows, length)."""
        ids = self.inputs["input_ids"]
        given = self.inputs.get("position_ids")
        return torch.arange(ids.shape[1], device=ids.device).expand_as(ids) if given is None else given.expand_as(ids)


class PackedRows:
    """The blocks of a packed forward, in their order.

    Args:
        blocks: at least one.
        counterparts: for each block, what its owner has in the place of a module of the body that computes them.
    """

    def __init__(self, blocks: Sequence[RowBlock], counterparts: Sequence[Mapping[nn.Module, nn.Module]]) -> None:
        self.blocks, self._counterparts = tuple(blocks), counterparts
        self.sizes = [block.tokens for block in blocks]

    def find_own(self, module: nn.Module) -> list[nn.Module]:
        """Return what each block's owner has in the place of a module."""
        return [own[module] for own in self._counterparts]

    def iterate_spans(self) -> Iterator[tuple[RowBlock, int, int]]:
        """Yield each block with its first token, and the one after its last."""
        start = 0
        for block, size in zip(self.blocks, self.sizes, strict=True):
            yield block, start, start + size
            start += size

    def pack_inputs(self) -> dict[str, Tensor]:
        """Return the inputs of the packed forward, each (1, T)."""
        first = self.blocks[0].inputs
        inputs = {name: _pack([block.inputs[name] for block in self.blocks]) for name in first if name in _BY_TOKEN}
        inputs["position_ids"] = _pack([block.positions for block in self.blocks])
        # With a mask transformers does not look for packed samples by itself; `_make_masks` has the rows' own.
        return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}

    def split(self, x: Tensor) -> list[Tensor]:
        """Return the part of each block, (rows, length, ...), of x (1, T, ...)."""
        parts = x.squeeze(0).split(self.sizes)
        return [part.unflatten(0, block.shape) for part, block in zip(parts, self.blocks, strict=True)]


_BY_TOKEN: Final = ("input_ids", "token_type_ids")
"""Inputs with a value for each token that are packed as they are."""
_rows: ContextVar[PackedRows] = ContextVar("rows")


def get_packed_rows() -> PackedRows:
    """Return the rows of the packed forward that is running."""
    return _rows.get()


def run_packed(body: nn.Module, rows: PackedRows) -> list[Tensor]:
    """Return the last hidden states of each block, (rows, length, width), by one forward of a body."""
    token = _rows.set(rows)
    try:
        return rows.split(body(**rows.pack_inputs(), use_cache=False)[0])
    finally:
        _rows.reset(token)


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let a model attend inside the rows of each block. It computes packed forwards only from then on."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attend_by_block)
    AttentionMaskInterface.register(ATTENTION, _make_masks)
    model.set_attn_implementation(ATTENTION)


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(1, -1) for tensor in tensors], dim=1)


def _make_masks(*, mask_function: Callable[..., Any], **options: Any) -> list[Tensor | None]:
    """Return the mask of each block, as transformers makes it for the block alone."""
    return [_make_mask(block, mask_function, options) for block in get_packed_rows().blocks]


def _make_mask(block: RowBlock, mask_function: Callable[..., Any], options: Mapping[str, Any]) -> Tensor | None:
    from transformers.masking_utils import (
        find_packed_sequence_indices,
        packed_sequence_compatibility_function,
        sdpa_mask,
    )

    rows, length = block.shape
    mask = block.inputs.get("attention_mask")
    can_skip_causal = options.get("allow_is_causal_skip", True)
    if mask is None and "position_ids" in block.inputs:  # packed samples: each attends to itself
        samples = find_packed_sequence_indices(block.positions)
        if samples is not None:
            mask_function = packed_sequence_compatibility_function(mask_function, block.positions, samples)
            can_skip_causal = False
    own: Tensor | None = sdpa_mask(
        **{
            **options,
            "batch_size": rows,
            "q_length": length,
            "kv_length": length,
            "mask_function": mask_function,
            "attention_mask": None if mask is None else mask.bool(),
            "allow_is_causal_skip": can_skip_causal,
        }
    )
    return own


def _attend_by_block(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: list[Tensor | None] | None,
    *,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return what the tokens of each block attend to, (1, T, heads, width).

    Args:
        query: (1, heads, T, width). key, value: (1, heads of keys, T, width).
        attention_mask: of each block; None for none.
        dropout: of the attention in training; a block whose owner is not in training has none.
    """
    from transformers import AttentionInterface

    rows = get_packed_rows()
    attend = AttentionInterface()[INNER_ATTENTION]
    parts = [_split_heads(rows, x) for x in (query, key, value)]
    masks = attention_mask or [None] * len(rows.blocks)
    outputs = []
    for block, own, mask, *qkv in zip(rows.blocks, rows.find_own(module), masks, *parts, strict=True):
        if dropout and own.training:
            with block.stream.draw():
                output, _ = attend(module, *qkv, mask, dropout=dropout, **options)
        else:
            output, _ = attend(module, *qkv, mask, dropout=0.0, **options)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0), None


def _split_heads(rows: PackedRows, x: Tensor) -> list[Tensor]:
    """Return the part of each block, (rows, heads, length, width), of x (1, heads, T, width)."""
    parts = x.squeeze(0).split(rows.sizes, dim=1)
    return [part.unflatten(1, block.shape).transpose(0, 1) for part, block in zip(parts, rows.blocks, strict=True)]
