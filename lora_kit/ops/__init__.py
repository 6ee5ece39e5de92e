"""The mathematics of a low-rank update, each operation one autograd function with a plain-torch body."""

from lora_kit.ops import backend, plain
from lora_kit.ops.dora import dora_scale, scale_columns
from lora_kit.ops.lora import (
    is_free,
    lora_add,
    lora_add_embedding,
    lora_add_embedding_rows,
    lora_add_rows,
    lora_linear,
)
from lora_kit.ops.loss import chunked_cross_entropy

__all__ = [
    "backend",
    "chunked_cross_entropy",
    "dora_scale",
    "is_free",
    "lora_add",
    "lora_add_embedding",
    "lora_add_embedding_rows",
    "lora_add_rows",
    "lora_linear",
    "plain",
    "scale_columns",
]
