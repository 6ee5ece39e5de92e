"""The card of a whole model that was made here: merged, or trained in every weight."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lora_kit.adapter.model_card import (
    TAG,
    format_code,
    format_front_matter,
    format_inline_code,
    format_table,
    name_local_path,
    render_card,
    write_base_loading_code,
)
from lora_kit.models.tasks import CAUSAL_LM, TASK_SPECS, infer_task_from_architecture

CONFIG_FILE: Final = "config.json"


def render_model_card(
    title: str,
    *sections: str,
    name: str,
    task: str,
    base: str,
    tag: str,
    facts: Sequence[tuple[str, str]],
) -> str:
    """Return a card with the YAML that model hubs read, the facts, and the code that loads the model.

    Args:
        title: of the card.
        sections: the first stands before the facts, the others after the code.
        name: of the folder.
        task: of the model.
        base: name of the base that it was made from.
        tag: how it was made, in a word.
        facts: rows of a table.
    """
    spec, path = TASK_SPECS[task], name_local_path(name)
    fields = {
        "library_name": "transformers",
        "pipeline_tag": spec.pipeline_tag,
        "base_model": base,
        "base_model_relation": "finetune",
        "tags": [tag, TAG],
    }
    loading = write_base_loading_code(path, task=task)
    other = format_inline_code(f"transformers.{spec.auto_class}.from_pretrained({path!r})")
    card = render_card(
        title,
        sections[0],
        format_table(facts),
        format_code(f"import lora_kit as lk\n\n{loading}\nmodel, tokenizer = base.model, base.tokenizer"),
        f"It is a folder of transformers: {other} loads it as well.",
        *sections[1:],
    )
    return format_front_matter(fields) + card


def infer_folder_task(folder: Path) -> str:
    """Return the task of the model in a folder, by the class in its config; `causal-lm` where that names none."""
    architectures = json.loads((folder / CONFIG_FILE).read_text("utf-8")).get("architectures") or [""]
    return infer_task_from_architecture(str(architectures[0])).name if architectures[0] else CAUSAL_LM
