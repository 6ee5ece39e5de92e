"""Training data: files read strictly, tokens with the loss where it belongs, padding that changes nothing."""

from __future__ import annotations

from lora_kit.data.chat import ChatTemplate, chat_template
from lora_kit.data.collate import Collator
from lora_kit.data.encode import IGNORED, LONGEST, Encoded, encode
from lora_kit.data.prepare import Preparation, prepare
from lora_kit.data.preview import Span, spans
from lora_kit.data.rows import Rows, Scan, label_names, read_rows, scan_rows

__all__ = [
    "IGNORED",
    "LONGEST",
    "ChatTemplate",
    "Collator",
    "Encoded",
    "Preparation",
    "Rows",
    "Scan",
    "Span",
    "chat_template",
    "encode",
    "label_names",
    "prepare",
    "read_rows",
    "scan_rows",
    "spans",
]
