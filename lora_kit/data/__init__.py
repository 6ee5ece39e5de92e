"""Training data: files read strictly, tokens with the loss where it belongs, padding that changes nothing."""

from __future__ import annotations

from lora_kit.data.batches import IGNORE_INDEX, Collator, EncodedDataset
from lora_kit.data.encode import encode
from lora_kit.data.layouts import FORMATS
from lora_kit.data.packing import PackedDataset, pack, reason_not_packable
from lora_kit.data.preparation.prepare import prepare
from lora_kit.data.preparation.prepared_folder import Preparation
from lora_kit.data.preview import Span, preview_sample
from lora_kit.data.rows import Rows, Scan, collect_label_names, read_rows, scan_rows
from lora_kit.data.sample_format import DEFAULT_MAX_LENGTH, SampleFormat
from lora_kit.data.templates import ChatTemplate, chat_template
from lora_kit.models.tasks import GENERATIVE_KINDS, NEXT, WORD

__all__ = [
    "DEFAULT_MAX_LENGTH",
    "FORMATS",
    "GENERATIVE_KINDS",
    "IGNORE_INDEX",
    "NEXT",
    "WORD",
    "ChatTemplate",
    "Collator",
    "EncodedDataset",
    "PackedDataset",
    "Preparation",
    "Rows",
    "SampleFormat",
    "Scan",
    "Span",
    "chat_template",
    "collect_label_names",
    "encode",
    "pack",
    "prepare",
    "preview_sample",
    "read_rows",
    "reason_not_packable",
    "scan_rows",
]
