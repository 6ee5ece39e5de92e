"""Tiny causal language models by what they do with the output of their head."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from tests.support import tiny

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def gemma2() -> Any:
    """Soft-capped logits."""
    config = transformers.Gemma2Config(**_SIZES, head_dim=8, attn_implementation="eager")
    return _made(transformers.Gemma2ForCausalLM, config)


def granite() -> Any:
    """Logits divided by a number."""
    return _made(transformers.GraniteForCausalLM, transformers.GraniteConfig(**_SIZES, logits_scaling=2.0))


def cohere() -> Any:
    """Logits times a number."""
    return _made(transformers.CohereForCausalLM, transformers.CohereConfig(**_SIZES))


def phi() -> Any:
    """A head with a bias."""
    return _made(transformers.PhiForCausalLM, transformers.PhiConfig(**_SIZES))


def neox() -> Any:
    """A head of another name."""
    sizes = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}
    return _made(transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(**sizes))


def _made(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return kind(config).eval()


class _Changed(transformers.LlamaForCausalLM):
    """A Llama that does something to its logits after all."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = self.change(outputs.logits)
        return outputs

    def change(self, logits: Tensor) -> Tensor:
        raise NotImplementedError


class Sliced(_Changed):
    def change(self, logits: Tensor) -> Tensor:
        return logits[..., :90]


class WrittenInto(_Changed):
    def change(self, logits: Tensor) -> Tensor:
        logits[..., 0] = 0
        return logits


class CastDown(_Changed):
    def change(self, logits: Tensor) -> Tensor:
        return logits.bfloat16()


class CastUp(_Changed):
    def change(self, logits: Tensor) -> Tensor:
        return logits.double()


class Twice(_Changed):
    def change(self, logits: Tensor) -> Tensor:
        self.lm_head(torch.zeros(1, 32))
        return logits


class LastOnly(_Changed):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return transformers.LlamaForCausalLM.forward(self, *args, **kwargs, logits_to_keep=1)


def changed(kind: type[_Changed]) -> Any:
    """A tiny Llama of this kind."""
    return _made(kind, tiny.llama().config)


MODELS = {"gemma2": gemma2, "granite": granite, "cohere": cohere, "phi": phi, "neox": neox}
