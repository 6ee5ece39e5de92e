"""Embeddings and heads of which adapters have rows of their own: a vector for each of a few tokens, trained alone.

Where the embedding looks up one of those tokens it gives the adapter's row; a head that shares its weight, or that has
rows of its own, scores those tokens with them. Nothing is added twice: one table holds the rows of all that share a
weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_kit.layers.introspect import features_of, is_stored_transposed, is_unquantized, kind_of
from lora_kit.layers.routing import BASE_SLOT, Routing
from lora_kit.layers.slot_layer import SlotLayer
from lora_kit.ops.lora import can_overwrite

TOKEN_EMBEDDINGS: Final = "token_rows"
TOKEN_INDICES: Final = "token_indices"
"""What an adapter brings: rows (k, d), and which tokens they are of (k,) int64."""
_TOKEN_ORDER: Final = "token_order"
"""Places of a slot's indices from the least one to the largest, by which they are looked up."""


def reason_not_token_table(module: nn.Module) -> str:
    """What keeps a module from having rows of its own for some tokens; empty for nothing."""
    weight, kind = getattr(module, "weight", None), kind_of(module)
    if kind not in ("embedding", "linear") or not isinstance(weight, Tensor) or type(module).__name__ == "Conv1D":
        return f"a {type(module).__name__} is neither an embedding nor a linear head"
    if not is_unquantized(weight):
        return "its weight is quantised"
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "it shortens its rows to max_norm as it looks them up"
        if type(module).forward is not nn.Embedding.forward and not hasattr(module, "embed_scale"):
            return f"a {type(module).__name__} does more than look rows up"
    return ""


def table_size(module: nn.Module) -> tuple[int, int]:
    """Tokens and features of an embedding or a head."""
    size_in, size_out = features_of(module)
    return (size_in, size_out) if is_stored_transposed(module) else (size_out, size_in)


class _TokenLayer(SlotLayer):
    """An embedding or a head that sees the rows of a table."""

    @property
    def table(self) -> TokenTable:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        routing, table = self.routing, self.table
        if not table.is_routed_by_index() and (routing.slot == BASE_SLOT or table.entries[routing.slot] is None):
            return y
        if kind_of(self.base_layer) == "embedding":
            return self._look_up_tokens(y, x)
        return self._score_tokens_by_row(y, x) if table.is_routed_by_index() else self._score_tokens(y, x)

    def _look_up_tokens(self, y: Tensor, ids: Tensor) -> Tensor:
        """y (..., d) with the adapter's rows where ids are tokens that it has some of."""
        indices, order, rows, first = self.table.get_lookup(ids)
        flat = ids.reshape(len(indices), -1).long().contiguous()
        place = torch.searchsorted(indices, flat, sorter=order).clamp_(max=indices.shape[1] - 1)
        place = order.gather(1, place)
        found = indices.gather(1, place) == flat
        chosen = functional.embedding(place + first, rows).to(y.dtype)
        # Gemma and BART multiply what they look up.
        scale = getattr(self.base_layer, "embed_scale", None)
        if scale is not None:
            chosen = chosen * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where(found.unsqueeze(-1), chosen, y.reshape(chosen.shape)).view(y.shape)

    def _score_tokens(self, y: Tensor, x: Tensor) -> Tensor:
        """y (..., V) with the scores of the one adapter's tokens.

        What is added is x (row - base's row)ᵀ, which is nothing, to the bit, while they are the same.
        """
        entry = self.table.entries[self.routing.slot]
        assert entry is not None
        indices = entry.tensors[TOKEN_INDICES].to(x.device)
        change = (entry.tensors[TOKEN_EMBEDDINGS].to(x.device) - self._weight[indices]).to(x.dtype)
        update = functional.linear(x, change).to(y.dtype)
        return y.index_add_(-1, indices, update) if can_overwrite(y) else y.index_add(-1, indices, update)

    def _score_tokens_by_row(self, y: Tensor, x: Tensor) -> Tensor:
        """y (n, ..., V) with the scores of the tokens of each row's adapter."""
        change, places = self._compute_changes(x)
        count = len(change)
        update = torch.bmm(x.reshape(count, -1, x.shape[-1]), change.mT).to(y.dtype)
        places = places.unsqueeze(1).expand(update.shape)
        return y.reshape(count, -1, y.shape[-1]).scatter_add(2, places, update).view(y.shape)

    def _compute_changes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of each row of the batch: row - base's row (R, k, d) in the dtype of x, and where it goes (R, k).

        Kept from one forward to the next while nothing about it changes.
        """
        index, table, prepared = self.routing.index(x), self.table, self.routing.row_cache
        keeps = self.routing.mixed and not table.trains and not table.is_recorded()
        kept = prepared.get(table) if keeps else None
        if kept is None or kept[0].dtype != x.dtype:
            indices = table.stacked_weights[TOKEN_INDICES].to(x.device).index_select(0, index)
            rows = table.get_stacked_embeddings().to(x.device).index_select(0, index)
            places = indices.clamp(max=self._weight.shape[0] - 1)  # a slot's empty places add nothing anywhere
            own = (indices < self._weight.shape[0]).unsqueeze(-1)
            kept = torch.where(own, rows - self._weight[places], 0).to(x.dtype), places
            if keeps:
                prepared[table] = kept
        found: tuple[Tensor, Tensor] = kept
        return found

    @property
    def _weight(self) -> Tensor:
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight


class TiedTokenLayer(_TokenLayer):
    """A module that shares the weight of an embedding, and so the rows that adapters have of it."""

    def __init__(self, base_layer: nn.Module, routing: Routing, table: TokenTable) -> None:
        super().__init__(base_layer, routing)
        self.__dict__["_table"] = table  # no child of this module: it has its place in the model

    @property
    def table(self) -> TokenTable:
        table: TokenTable = self.__dict__["_table"]
        return table

    def reserve(self, slots: int, rank: int, dtype: torch.dtype) -> None:
        """Nothing is kept here."""

    def refresh_from_base(self) -> None:
        """Nothing is derived here."""


class TokenTable(_TokenLayer):
    """An embedding or a head of which adapters have rows: slabs of them (slots, k, d), and of which tokens (slots, k).

    There is room for as many as the adapters so far have had; a slot's empty places name a token that there is not.
    """

    @property
    def table(self) -> TokenTable:
        return self

    def make_identity_stack(self, slots: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        count, features = table_size(self.base_layer)
        return {
            TOKEN_EMBEDDINGS: torch.zeros(slots, rank, features, dtype=dtype, device=self.device),
            TOKEN_INDICES: torch.full((slots, rank), count, device=self.device),
            _TOKEN_ORDER: torch.arange(rank, device=self.device).repeat(slots, 1),
        }

    def put(self, slot: int, tensors: Mapping[str, Tensor], scaling: float) -> None:
        super().put(slot, {**tensors, _TOKEN_ORDER: tensors[TOKEN_INDICES].argsort()}, scaling)

    def refresh_from_base(self) -> None:
        super().refresh_from_base()
        self.routing.row_cache.pop(self, None)

    def get_base_embeddings(self, indices: Tensor) -> Tensor:
        """What the base has for these tokens: (k, d) in fp32."""
        return self._weight.detach()[indices].float()

    def is_routed_by_index(self) -> bool:
        """Whether slots are read from a tensor: where rows differ, and where a forward is recorded to run again."""
        if self.routing.mixed:
            return True
        if self.trains and torch.is_grad_enabled():
            return False
        return self.is_recorded()

    def get_stacked_embeddings(self) -> Tensor:
        """(slots, k, d), differentiable."""
        return self._slab(TOKEN_EMBEDDINGS)

    def get_lookup(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        """The tokens (R, k) that each of R rows of a batch has, their order (R, k), and rows (N, d) to take from.

        The last is where a row's own begin there: (R, 1), or one number.
        """
        if not self.is_routed_by_index():
            entry = self.entries[self.routing.slot]
            assert entry is not None
            held = {name: tensor.to(ids.device) for name, tensor in entry.tensors.items()}
            return held[TOKEN_INDICES].unsqueeze(0), held[_TOKEN_ORDER].unsqueeze(0), held[TOKEN_EMBEDDINGS], 0
        index = self.routing.index(ids)
        indices, order = (
            self.stacked_weights[name].to(ids.device).index_select(0, index) for name in (TOKEN_INDICES, _TOKEN_ORDER)
        )
        rows = self.get_stacked_embeddings().to(ids.device)
        return indices, order, rows.flatten(0, 1), index.unsqueeze(1) * rows.shape[1]
