"""Prompts that the model answers itself, with any further columns: what a reward function is given beside the answer.

columns                                  format       value of a row
prompt, and any others                   prompt       (prompt, the whole row as JSON text)
the same with a list of messages         chat-prompt  (conversation, the whole row as JSON text)

A file of which `prompt` is the only column has this layout for everybody. With other columns it may be anything else as
well (a question and its answer), so that only an objective which wants prompts reads it like this.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

from lora_kit.data.cells import RowError, read_string
from lora_kit.data.layouts import Layout, RowValue
from lora_kit.data.read_messages import CONVERSATION_KEYS, read_open_conversation
from lora_kit.data.records import Row
from lora_kit.errors import DataError, format_list
from lora_kit.io.text import shorten

PROMPT_FORMATS: Final = ("prompt", "chat-prompt")
"""Formats whose rows have no answer."""
_RESERVED: Final = (
    *("completion", "completions", "completion_ids", "prompts"),
    *("trainer_state", "log_extra", "log_metric", "environments", "image", "images", "prompt_ids"),
)
"""Columns that a reward function would not be given as they are: TRL uses these names itself."""

LayoutFinder = Callable[[Path, Row], Layout]
"""Returns the layout of the first row of a file; raises DataError where it has none."""


def find_prompt_layout(row: Row) -> Layout | None:
    """Return the layout of a row that is a prompt and nothing else; None for any other row."""
    return _choose_layout(row) if {*row} - {*CONVERSATION_KEYS} == {"prompt"} else None


def require_prompt_layout(path: Path, row: Row) -> Layout:
    """Return the layout of the first row of a file of prompts, whatever further columns it has.

    Raises:
        DataError: there is no prompt, or a further column cannot be handed to a reward function.
    """
    if "prompt" not in row:
        what = f"{path}: the first row has the keys {shorten(format_list(sorted(row)), most=60)}, and no prompt"
        raise DataError(what, hint="give a column another name: lora-kit prepare --rename question=prompt")
    reserved = [key for key in _RESERVED if key in row]
    if reserved:
        what = f"{path}: a reward function would not be given the column {reserved[0]}, whose name TRL uses itself"
        hint = f"another name: lora-kit prepare --rewards FILE.py:FUNCTION --rename {reserved[0]}=answer"
        raise DataError(what, hint=hint)
    return _choose_layout(row)


def parse_prompt_row(value: RowValue) -> dict[str, object]:
    """Return the row that a value was read from, with all its columns."""
    row: dict[str, object] = json.loads(value[1])
    return row


def _choose_layout(row: Row) -> Layout:
    return _CONVERSATIONS if isinstance(row["prompt"], list) else _TEXTS


def _read_text(row: Row) -> RowValue:
    return read_string("prompt", row["prompt"]), _keep_columns(row)


def _read_conversation(row: Row) -> RowValue:
    further = {name: row[name] for name in CONVERSATION_KEYS if row.get(name) is not None}
    try:
        return read_open_conversation({**further, "messages": row["prompt"]}), _keep_columns(row)
    except RowError as error:
        raise RowError(f"prompt: {error}", kind=error.kind) from None


def _keep_columns(row: Row) -> str:
    """Return a row as JSON text, which can be compared and hashed as it is."""
    try:
        return json.dumps(row, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise RowError(f"a column holds what JSON does not have: {error}") from None


_TEXTS: Final = Layout("prompt", ("prompt",), "prompt", _read_text, in_lists=False, reads_all=True)
_CONVERSATIONS: Final = Layout(
    "prompt as messages", ("prompt",), "chat-prompt", _read_conversation, in_lists=True, reads_all=True
)
