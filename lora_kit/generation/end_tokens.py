"""The tokens that end a model's answers, in the file where other programs look for them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from lora_kit.adapter.use_record import find_recorded_data
from lora_kit.data.answer_ends import find_template_ends
from lora_kit.errors import DataError
from lora_kit.generation.prompts import build_recorded_template
from lora_kit.models.protocols import Tokenizer

logger = logging.getLogger(__name__)

GENERATION_CONFIG: Final = "generation_config.json"
_TOKENS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")


def add_answer_ends(folder: Path, use: Mapping[str, object], tokenizer: Tokenizer) -> tuple[str, ...]:
    """Let `generation_config.json` of a model folder have every token that ends an answer in its chat template.

    A model that learned to end with `<|im_end|>`, where its base ends with `<|endoftext|>`, would be read on past its
    answer by programs that know only this file.

    Args:
        folder: of the model, with its `config.json`.
        use: its record; one without a chat template changes nothing.
        tokenizer: of the model.

    Returns:
        The tokens that were added.
    """
    template = build_recorded_template(find_recorded_data(use) or {}, "the chat template in the record")
    if template is None:
        return ()
    try:
        ends = find_template_ends(template, tokenizer)
    except DataError as error:
        logger.warning("%s is left as it is: %s", GENERATION_CONFIG, error)
        return ()
    fields = _read_fields(folder)
    own = fields.get("eos_token_id")
    known = own if isinstance(own, list) else [] if own is None else [own]
    added = sorted(ends - set(known))
    if added:
        text = json.dumps({**fields, "eos_token_id": [*known, *added]}, indent=2, sort_keys=True)
        (folder / GENERATION_CONFIG).write_bytes(f"{text}\n".encode())
    return tuple(str(tokenizer.convert_ids_to_tokens(token)) for token in added)


def _read_fields(folder: Path) -> dict[str, object]:
    """Return the fields of the file; without one those that programs take from `config.json` instead."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config = {**config, **(config.get("text_config") or {})}
    file = folder / GENERATION_CONFIG
    fields = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    names = ("eos_token_id",) if fields else _TOKENS
    missing = {name: config[name] for name in names if fields.get(name) is None and config.get(name) is not None}
    return {**fields, **missing}
