"""Token embeddings: embeddings and heads of which an adapter replaces a few rows, one vector for each of some tokens.

Where the embedding looks up one of those tokens, it returns the adapter's row. A head that shares its weight, or that
has rows of its own, scores those tokens with them. Nothing is added twice: one table holds the rows of all modules that
share a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_kit.layers.introspect import features_of, is_stored_transposed, is_unquantized, kind_of, unwrap_module
from lora_kit.layers.route import BASE_SLOT, Route
from lora_kit.layers.routing import Routing
from lora_kit.layers.slot_entry import SlotEntry
from lora_kit.layers.slot_layer import SlotLayer
from lora_kit.layers.token_runs import RunRoute, forward_tokens
from lora_kit.ops.lora_functions import can_overwrite

TOKEN_EMBEDDINGS: Final = "token_rows"
TOKEN_INDICES: Final = "token_indices"
"""What an adapter brings: rows (k, d), and the tokens they belong to (k,) int64."""
_TOKEN_ORDER: Final = "token_order"
"""Positions that sort a slot's indices, by which they are searched."""


def reason_not_token_table(module: nn.Module) -> str | None:
    """Return why adapters cannot have rows of a module's weight; None where they can."""
    weight, kind = getattr(module, "weight", None), kind_of(module)
    if kind not in ("embedding", "linear") or not isinstance(weight, Tensor) or type(module).__name__ == "Conv1D":
        return f"a {type(module).__name__} is neither an embedding nor a linear head"
    if not is_unquantized(weight):
        return "its weight is quantized"
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "it shortens its rows to max_norm as it looks them up"
        if type(module).forward is not nn.Embedding.forward and not hasattr(module, "embed_scale"):
            return f"a {type(module).__name__} does more than look rows up"
    return None


def table_size(module: nn.Module) -> tuple[int, int]:
    """Return the number of tokens and of features of an embedding or a head."""
    size_in, size_out = features_of(module)
    return (size_in, size_out) if is_stored_transposed(module) else (size_out, size_in)


class _TokenLayer(SlotLayer):
    """An embedding or a head that uses the rows of a table."""

    @property
    def table(self) -> TokenTable:
        """The table with the rows of all modules that share this one's weight."""
        raise NotImplementedError

    def _find_entry(self, slot: int, name: str) -> SlotEntry | None:
        return self.table.entries[slot] if name == "weight" else None

    def compute_updated_weight(self, entry: SlotEntry, weight: Tensor) -> Tensor:
        own = {name: tensor.to(weight.device) for name, tensor in entry.tensors.items()}
        return weight.index_copy(0, own[TOKEN_INDICES], own[TOKEN_EMBEDDINGS].to(weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        route, table = self.routing.get_route(), self.table
        if isinstance(route, RunRoute):
            return forward_tokens(self, route, x)
        y: Tensor = self.call_base(x)
        by_index = table.is_routed_by_index(route)
        if not by_index and (route.slot == BASE_SLOT or table.entries[route.slot] is None):
            return y
        if not self.is_recorded() and not any(table.entries[slot] for slot in route.slots):
            return y
        self.routing.check_rows(route, x, self)
        if kind_of(self.base_layer) == "embedding":
            return self._look_up_tokens(route, y, x)
        return self._score_tokens_by_row(route, y, x) if by_index else self._score_tokens(route, y, x)

    def _look_up_tokens(self, route: Route, y: Tensor, ids: Tensor) -> Tensor:
        """Return y (..., d) with the adapter's rows where ids are tokens that it has rows of."""
        indices, order, rows, first = self.table.get_lookup(route, ids)
        flat = ids.reshape(len(indices), -1).long().contiguous()
        position = torch.searchsorted(indices, flat, sorter=order).clamp_(max=indices.shape[1] - 1)
        position = order.gather(1, position)
        is_own = indices.gather(1, position) == flat
        chosen = functional.embedding(position + first, rows).to(y.dtype)
        # Gemma and BART multiply what they look up.
        scale = getattr(self.base_layer, "embed_scale", None)
        if scale is not None:
            chosen = chosen * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where(is_own.unsqueeze(-1), chosen, y.reshape(chosen.shape)).view(y.shape)

    def _score_tokens(self, route: Route, y: Tensor, x: Tensor) -> Tensor:
        """Return y (..., V) with the scores of the one adapter's tokens.

        What is added is x (row - base's row)ᵀ, which is exactly zero while the two are the same.
        """
        entry = self.table.entries[route.slot]
        assert entry is not None
        indices = entry.tensors[TOKEN_INDICES].to(x.device)
        change = (entry.tensors[TOKEN_EMBEDDINGS].to(x.device) - self._weight[indices]).to(x.dtype)
        update = functional.linear(x, change).to(y.dtype)
        return y.index_add_(-1, indices, update) if can_overwrite(y) else y.index_add(-1, indices, update)

    def _score_tokens_by_row(self, route: Route, y: Tensor, x: Tensor) -> Tensor:
        """Return y (n, ..., V) with the scores of the tokens of each row's adapter."""
        change, tokens = self._get_changes(route, x)
        count = len(change)
        update = torch.bmm(x.reshape(count, -1, x.shape[-1]), change.mT).to(y.dtype)
        tokens = tokens.unsqueeze(1).expand(update.shape)
        return y.reshape(count, -1, y.shape[-1]).scatter_add(2, tokens, update).view(y.shape)

    def _get_changes(self, route: Route, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return row - base's row (R, k, d) in the dtype of x, and its token (R, k), for each row of the batch.

        Cached from one forward to the next while nothing about it changes.
        """
        table = self.table
        can_cache = route.mixed and not table.trains and not table.is_recorded()
        if not can_cache:
            return self._compute_changes(route, x)
        cache = self.routing.get_row_cache(route).token_changes
        cached = cache.get(table)
        if cached is None or cached[0].dtype != x.dtype or len(cached[0]) != len(route.rows):
            cached = cache[table] = self._compute_changes(route, x)
        return cached

    def _compute_changes(self, route: Route, x: Tensor) -> tuple[Tensor, Tensor]:
        index, count = self.routing.get_index(route, x), self._weight.shape[0]
        stacks = self.table.get_stacks_on(x.device, TOKEN_INDICES, TOKEN_EMBEDDINGS)
        indices, rows = (stacked.index_select(0, index) for stacked in stacks)
        tokens = indices.clamp(max=count - 1)  # unused positions of a slot add zero to some token
        is_used = (indices < count).unsqueeze(-1)
        return torch.where(is_used, rows - self._weight[tokens], 0).to(x.dtype), tokens

    @property
    def _weight(self) -> Tensor:
        weight = unwrap_module(self).weight
        assert isinstance(weight, Tensor)
        return weight


class TiedTokenLayer(_TokenLayer):
    """A module that shares its weight with the module of a table, and so uses the rows of that table."""

    def __init__(self, base_layer: nn.Module, routing: Routing, table: TokenTable) -> None:
        super().__init__(base_layer, routing)
        self.__dict__["_table"] = table  # not a child of this module: it stands elsewhere in the model

    @property
    def table(self) -> TokenTable:
        table: TokenTable = self.__dict__["_table"]
        return table

    def reserve(self, slots: int, rank: int, dtype: torch.dtype) -> None:
        """Do nothing: the weights are the table's."""

    def refresh_from_base(self) -> None:
        """Do nothing: the table does."""


class TokenTable(_TokenLayer):
    """An embedding or a head of which adapters have rows: stacked rows (slots, k, d), and their tokens (slots, k).

    The capacity k is the most that an adapter so far has had. Unused positions of a slot hold an index beyond the last
    token.
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
        self.routing.discard_caches()

    def get_base_embeddings(self, indices: Tensor) -> Tensor:
        """Return the base's rows for these tokens, (k, d) in fp32."""
        return self._weight.detach()[indices].float()

    def is_routed_by_index(self, route: Route) -> bool:
        """Return whether slots are read from a tensor: where rows differ, and in a forward that is recorded."""
        if route.mixed:
            return True
        if self.trains and torch.is_grad_enabled():
            return False
        return self.is_recorded()

    def get_stacks_on(self, device: torch.device, *names: str) -> list[Tensor]:
        """Return stacked weights of all slots on a device, differentiable."""
        return [stacked.to(device) for stacked in self._get_stacks(*names)]

    def get_lookup(self, route: Route, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | int]:
        """Return what ids of R rows of a batch are looked up in.

        Returns:
            the tokens (R, k) of each row's adapter, the positions (R, k) that sort them, rows (N, d) of embeddings, and
            where in these a row's own begin: (R, 1), or one number.
        """
        if not self.is_routed_by_index(route):
            entry = self.entries[route.slot]
            assert entry is not None
            own = {name: tensor.to(ids.device) for name, tensor in entry.tensors.items()}
            return own[TOKEN_INDICES].unsqueeze(0), own[_TOKEN_ORDER].unsqueeze(0), own[TOKEN_EMBEDDINGS], 0
        index = self.routing.get_index(route, ids)
        *tables, rows = self.get_stacks_on(ids.device, TOKEN_INDICES, _TOKEN_ORDER, TOKEN_EMBEDDINGS)
        indices, order = (stacked.index_select(0, index) for stacked in tables)
        return indices, order, rows.flatten(0, 1), index.unsqueeze(1) * rows.shape[1]
