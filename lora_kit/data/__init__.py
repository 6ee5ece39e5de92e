"""Training data: files read strictly, tokens with the loss where it belongs, padding that changes nothing."""

from __future__ import annotations

from lora_kit.data.collate import Collator
from lora_kit.data.encode import IGNORED, Encoded, encode
from lora_kit.data.rows import Rows, label_names, read_rows

__all__ = ["IGNORED", "Collator", "Encoded", "Rows", "encode", "label_names", "read_rows"]
