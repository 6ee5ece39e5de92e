"""How many tokens a base reads at once: what its model has positions for, and its tokenizer says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from lora_kit.models.protocols import Tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_POSITION_EMBEDDINGS: Final = "position_embeddings"
"""Name of the module with the absolute positions in encoders."""
_UNLIMITED: Final = 2**30
"""Tokens that a base reads, where neither its config nor its tokenizer says."""


def max_length_of(config: PretrainedConfig, tokenizer: Tokenizer) -> int:
    """Return the tokens that a model of this config reads; 2^30 where neither it nor the tokenizer says."""
    text = config.get_text_config()
    if _has_relative_positions_only(text):
        # The tokenizer has the length of the pretraining, and T5's own config an `n_positions` that nothing reads.
        return _UNLIMITED
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    limits.append(getattr(tokenizer, "model_max_length", None))
    return min([limit for limit in limits if isinstance(limit, int) and limit > 0] + [_UNLIMITED])


def _has_relative_positions_only(config: PretrainedConfig) -> bool:
    """Return whether attention knows distances alone, as that of T5, so that no text is too long."""
    positions = getattr(config, "max_position_embeddings", None)
    return hasattr(config, "relative_attention_num_buckets") and positions is None


def count_reserved_positions(model: nn.Module) -> int:
    """Return how many rows of the position embeddings no token gets: those up to the one of padding, as in RoBERTa."""
    tables = [
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and path.rpartition(".")[2] == _POSITION_EMBEDDINGS
    ]
    paddings = [table.padding_idx for table in tables if table.padding_idx is not None]
    return max(paddings, default=-1) + 1


def count_reserved_positions_of(config: PretrainedConfig) -> int:
    """Return `count_reserved_positions` of the model of a config, which is built without memory."""
    text = config.get_text_config()
    is_rotary = any(getattr(text, name, None) is not None for name in ("rope_parameters", "rope_theta"))
    if is_rotary or None in (getattr(text, "max_position_embeddings", None), text.pad_token_id):
        return 0
    from transformers import AutoModel

    with torch.device("meta"):
        return count_reserved_positions(AutoModel.from_config(config))
