"""Embeddings with LoRA weights beside them."""

from __future__ import annotations

from torch import Tensor

from lora_kit.layers.initialization import A, B
from lora_kit.layers.linear import _LoraLayer
from lora_kit.layers.token_runs import RunRoute, forward_tokens
from lora_kit.ops.lora import lora_add_embedding, lora_add_embedding_rows
from lora_kit.ops.lora_functions import guard_backward


class LoraEmbedding(_LoraLayer):
    """base(ids) + scaling · Aᵀ[ids] Bᵀ: the low-rank update of the table, looked up."""

    def forward(self, ids: Tensor) -> Tensor:
        route = self.routing.get_route()
        if isinstance(route, RunRoute):
            return forward_tokens(self, route, ids)
        y: Tensor = self.call_base(ids)
        # Gemma and BART multiply what they look up. The update is of the table, so it is multiplied too.
        scale = float(getattr(self.base_layer, "embed_scale", 1.0))
        if self._is_routed_by_index(route, y):
            if not self.is_recorded() and not any(self.entries[slot] for slot in route.slots):
                return y
            self.routing.check_rows(route, ids, self)
            a, b = self._get_stacks(A, B)
            return lora_add_embedding_rows(y, ids, a, b, self.scaling * scale, self.routing.get_index(route, ids))
        entry = self._get_entry(route)
        if entry is None:
            return y
        updated = lora_add_embedding(y, ids, entry.tensors[A], entry.tensors[B], entry.scaling * scale)
        guard_backward(updated, entry.list_read_as(y.dtype))
        return updated
