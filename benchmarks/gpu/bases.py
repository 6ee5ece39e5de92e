"""Llamas of the published 8B shapes with random weights, made where they are used: nothing is downloaded."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama.

    Attributes:
        width, inner, keys: of the residual stream, of the feed-forward layer, and of the keys and values of a layer.
    """

    width: int
    inner: int
    keys: int
    heads: int
    vocabulary: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the linear layers of one decoder layer, those of one shape once."""
        return {
            "q, o": (self.width, self.width),
            "k, v": (self.width, self.keys),
            "gate, up": (self.width, self.inner),
            "down": (self.inner, self.width),
        }


LLAMA_3_8B: Final = Shape(width=4096, inner=14336, keys=1024, heads=32, vocabulary=128256)
TINY: Final = Shape(width=64, inner=96, keys=32, heads=4, vocabulary=2048)


def llama(shape: Shape, *, layers: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A frozen Llama with random weights, made on its device."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.keys * shape.heads // shape.width,
        vocab_size=shape.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model: Any = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def twin(model: Any) -> Any:
    """A model with modules of its own around the very same tensors: several cases, the weights in memory once."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def in_4bit(model: Any) -> Any:
    """The model with the linear layers of its decoder in NF4, in place; the head stays as it is."""
    import bitsandbytes

    for layer in model.model.layers:
        _replace(layer, lambda linear: _nf4(bitsandbytes, linear))
    model.is_loaded_in_4bit = True  # which is how PEFT knows
    return model


def _replace(module: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, make(child))
        else:
            _replace(child, make)


def _nf4(bitsandbytes: Any, linear: nn.Linear) -> nn.Module:
    made: nn.Module = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4"
    )
    weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    made.weight = weight.to(linear.weight.device)  # which quantizes
    return made
