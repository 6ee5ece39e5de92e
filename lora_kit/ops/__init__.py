"""The mathematics of a low-rank update, each operation one autograd function with a plain-torch body."""

from lora_kit.ops.dora import dora_scale, scale_columns
from lora_kit.ops.lora import lora_add, lora_add_embedding, lora_add_embedding_rows, lora_add_rows

__all__ = [
    "dora_scale",
    "lora_add",
    "lora_add_embedding",
    "lora_add_embedding_rows",
    "lora_add_rows",
    "scale_columns",
]
