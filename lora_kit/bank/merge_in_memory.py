"""Folding an adapter into the weights of a model in memory, all of it or nothing."""

from __future__ import annotations

import torch
from torch import nn

from lora_kit.bank.model_layers import WrappedLayers
from lora_kit.bank.residents import LoadedAdapter
from lora_kit.layers.fold import Retention, check_foldable, fold_slot, round_to_dtype, weight_of
from lora_kit.layers.saved_module import SavedModule
from lora_kit.layers.token_embedding import TOKEN_EMBEDDINGS, TOKEN_INDICES, TokenTable
from lora_kit.targets.token_rows import path_of


@torch.no_grad()
def fold_into_model(resident: LoadedAdapter, layers: WrappedLayers, model: nn.Module) -> list[Retention]:
    """Put what a resident does into the base's weights.

    Everything is computed before anything is written: a failure must leave the base whole, and keeping copies of all
    weights would double the memory. Largest first, so that what does not fit in memory is found at once.

    Raises:
        MergeError: a covered weight is quantised or shared with another module, or the result is not finite; the model
            is as it was.
    """
    own, slot = {path: layers[path] for path in resident.layers}, resident.slot
    tables = [path for path, layer in own.items() if isinstance(layer, TokenTable)]
    # The rows of a table are those of every module that shares its weight.
    check_foldable(model, ((path, layer) for path, layer in own.items() if path not in tables))
    whole = [path for path, layer in own.items() if isinstance(layer, SavedModule)]
    pairs = sorted(own.keys() - {*tables, *whole}, key=lambda path: -weight_of(own[path]).numel())
    retentions = {path: fold_slot(path, own[path], slot)[1] for path in pairs}
    rows = {path: _round_token_embeddings(path, layers, slot) for path in tables}
    for path in pairs:
        weight_of(own[path]).copy_(fold_slot(path, own[path], slot)[0])
    for path in whole:
        own[path].base_layer.load_state_dict(layers.entry(path, slot).tensors)
    for path, (merged, retention) in rows.items():
        weight_of(own[path])[layers.entry(path, slot).tensors[TOKEN_INDICES]] = merged
        retentions[path] = retention
    return [retentions[path] for path in own if path in retentions]


def _round_token_embeddings(path: str, layers: WrappedLayers, slot: int) -> tuple[torch.Tensor, Retention]:
    """Rows in the dtype of their table, and what survived of their change."""
    held, weight = layers.entry(path, slot).tensors, weight_of(layers[path])
    return round_to_dtype(
        path_of(path), weight[held[TOKEN_INDICES]].float(), held[TOKEN_EMBEDDINGS].float(), weight.dtype
    )
