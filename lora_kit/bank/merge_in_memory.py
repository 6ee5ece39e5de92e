"""Fold an adapter into the weights of a model in memory, all of it or nothing."""

from __future__ import annotations

import torch
from torch import nn

from lora_kit.bank.model_layers import WrappedLayers
from lora_kit.bank.slots import LoadedAdapter
from lora_kit.layers.fold import Retention, check_foldable, fold_slot, round_to_dtype, weight_of
from lora_kit.layers.saved_module import SavedModule
from lora_kit.layers.token_embedding import TOKEN_EMBEDDINGS, TOKEN_INDICES, TokenTable
from lora_kit.targets.token_rows import path_of


@torch.no_grad()
def fold_into_model(loaded: LoadedAdapter, layers: WrappedLayers, model: nn.Module) -> list[Retention]:
    """Add an adapter's updates to the base's weights; return how much of each survived.

    Every weight is computed twice: once to see that nothing fails, before any is written, and once to write it. Copies
    of all weights would double the memory. The largest comes first, so that a lack of memory shows at once.

    Raises:
        MergeError: a covered weight is quantized or shared with another module, or the result is not finite; the model
            is as it was.
    """
    own, slot = {path: layers[path] for path in loaded.layers}, loaded.slot
    tables = [path for path, layer in own.items() if isinstance(layer, TokenTable)]
    # The rows of a table belong to every module that shares its weight, so that may be shared.
    check_foldable(model, ((path, layer) for path, layer in own.items() if path not in tables))
    saved = [path for path, layer in own.items() if isinstance(layer, SavedModule)]
    lora = sorted(own.keys() - {*tables, *saved}, key=lambda path: -weight_of(own[path]).numel())
    retentions = {path: fold_slot(path, own[path], slot)[1] for path in lora}
    rows = {path: _round_token_embeddings(path, layers, slot) for path in tables}
    for path in lora:
        weight_of(own[path]).copy_(fold_slot(path, own[path], slot)[0])
    for path in saved:
        own[path].base_layer.load_state_dict(layers.entry(path, slot).tensors)
    for path, (merged, retention) in rows.items():
        weight_of(own[path])[layers.entry(path, slot).tensors[TOKEN_INDICES]] = merged
        retentions[path] = retention
    return [retentions[path] for path in own if path in retentions]


def _round_token_embeddings(path: str, layers: WrappedLayers, slot: int) -> tuple[torch.Tensor, Retention]:
    """Return rows in the dtype of their table, and how much of their change survived."""
    tensors, weight = layers.entry(path, slot).tensors, weight_of(layers[path])
    before, after = weight[tensors[TOKEN_INDICES]].float(), tensors[TOKEN_EMBEDDINGS].float()
    return round_to_dtype(path_of(path), before, after, weight.dtype)
