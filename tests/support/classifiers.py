"""Tiny classifiers of every family, and PeftModels of them as `get_peft_model` makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import peft
import torch
import transformers
from torch import Tensor

_SIZES: Final = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_labels": 3,
}
_DISENTANGLED: Final = {**_SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
FAMILIES: Final[Mapping[str, tuple[Mapping[str, Any], list[str]]]] = {
    "Albert": ({**_SIZES, "embedding_size": 16}, ["query", "value"]),
    "Bert": (_SIZES, ["query", "value"]),
    "Camembert": (_SIZES, ["query", "value"]),
    "Deberta": (_DISENTANGLED, ["in_proj"]),
    "DebertaV2": (_DISENTANGLED, ["query_proj", "value_proj"]),
    "DistilBert": ({**_SIZES, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}, ["q_lin", "v_lin"]),
    "Electra": ({**_SIZES, "embedding_size": 16}, ["query", "value"]),
    "GPT2": (
        {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "num_labels": 3},
        ["c_attn"],
    ),
    "Llama": ({**_SIZES, "num_key_value_heads": 2}, ["q_proj", "v_proj"]),
    "Roberta": (_SIZES, ["query", "value"]),
    "XLMRoberta": (_SIZES, ["query", "value"]),
}
"""The fields of each family's config, and the layers that get LoRA weights; by the beginning of its class names."""
HEADS: Final = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification"}


def classifier(family: str, task_type: str) -> Any:
    """A model with a head, always with the same weights."""
    kind = getattr(transformers, f"{family}For{HEADS[task_type]}")
    fields = dict(FAMILIES[family][0])
    torch.manual_seed(0)
    config = kind.config_class(**fields)
    config.pad_token_id = 0
    return kind(config).eval()


def peft_classifier(family: str, task_type: str, **fields: Any) -> Any:
    """A PeftModel of a classifier whose adapter does something."""
    fields = {"r": 4, "lora_alpha": 8, "target_modules": FAMILIES[family][1], **fields}
    config = peft.LoraConfig(task_type=task_type, fan_in_fan_out=family == "GPT2", **fields)
    model = peft.get_peft_model(classifier(family, task_type), config).eval()
    shake(model)
    return model


def shake(model: torch.nn.Module) -> None:
    """Change every parameter that is trained."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def batch() -> dict[str, Tensor]:
    """Token ids without padding, (3, 7)."""
    ids = torch.randint(3, 96, (3, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model: Any) -> Tensor:
    """What a model makes of the batch."""
    with torch.no_grad():
        result: Tensor = model(**batch()).logits
    return result
