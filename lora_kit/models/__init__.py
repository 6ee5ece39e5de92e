"""Bases: where they are found, how they are loaded, what their head is, and how a text becomes what they read."""

from __future__ import annotations

from lora_kit.models.finding import KIT_BASE, KIT_FOLDER, check_config, first_told, quiet
from lora_kit.models.heads import LABELLED, head_modules
from lora_kit.models.loading import TASKS, Base, Reader, load_base, load_reader
from lora_kit.models.prompts import (
    DEFAULT_SEPARATOR,
    decoder_inputs,
    prompt_ids,
    render_prompt,
    source_ids,
    special_tokens,
    text_ids,
    without_special,
)
from lora_kit.models.quantization import QUANTIZATIONS

__all__ = [
    "DEFAULT_SEPARATOR",
    "KIT_BASE",
    "KIT_FOLDER",
    "LABELLED",
    "QUANTIZATIONS",
    "TASKS",
    "Base",
    "Reader",
    "check_config",
    "decoder_inputs",
    "first_told",
    "head_modules",
    "load_base",
    "load_reader",
    "prompt_ids",
    "quiet",
    "render_prompt",
    "source_ids",
    "special_tokens",
    "text_ids",
    "without_special",
]
