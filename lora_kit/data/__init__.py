"""Training data: files read strictly, tokens with the loss where it belongs, padding that changes nothing."""

from __future__ import annotations

from lora_kit.data.batches import IGNORED, NEXT, WORD, WRITTEN, Collator, Encoded
from lora_kit.data.chat import ChatTemplate, chat_template
from lora_kit.data.encode import LONGEST, encode
from lora_kit.data.layouts import FORMATS
from lora_kit.data.packing import Packed, pack, why_not_packed
from lora_kit.data.preparation.prepare import Preparation, prepare
from lora_kit.data.preview import Span, spans
from lora_kit.data.rows import Rows, Scan, label_names, read_rows, scan_rows

__all__ = [
    "FORMATS",
    "IGNORED",
    "LONGEST",
    "NEXT",
    "WORD",
    "WRITTEN",
    "ChatTemplate",
    "Collator",
    "Encoded",
    "Packed",
    "Preparation",
    "Rows",
    "Scan",
    "Span",
    "chat_template",
    "encode",
    "label_names",
    "pack",
    "prepare",
    "read_rows",
    "scan_rows",
    "spans",
    "why_not_packed",
]
