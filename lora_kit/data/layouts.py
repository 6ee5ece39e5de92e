"""Layouts: which columns a file has, and which of the five training formats its rows become.

layout                             format       value of a row
prompt, completion                 completion   (prompt, completion)
instruction, [input], output       completion   (instruction, then an empty line and the input if any; output)
prompt, completion as messages     chat         (conversation,)
messages: [{role, content}]        chat         (conversation,); see `lora_kit.data.read_messages` for further keys
conversations: [{from, value}]     chat         the same; the first message may be in a column of its own, `system`
text, label                        label        (text, label), or (text, label, weight); with `text_pair` the text is
                                                (text, text_pair)
text, labels                       label        (text, (label, …)), or with a weight
words, labels                      words        ((word, …), (label, …)), or with a weight
tokens, ner_tags                   words        the same
text                               text         (text,)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from lora_kit.data.cells import RowError, read_optional_string, read_string
from lora_kit.data.label_columns import (
    PAIR,
    WEIGHT,
    read_labeled_text,
    read_ner_tags,
    read_tagged_words,
    read_text_with_labels,
)
from lora_kit.data.read_messages import CONVERSATION_KEYS, read_messages, read_prompt_messages, read_sharegpt
from lora_kit.data.records import Row
from lora_kit.errors import format_list
from lora_kit.models.tasks import CAUSAL_LM, CLASSIFY, SEQ2SEQ, TOKENS

RowValue = tuple[Any, ...]
"""A row in its format; the table above lists its values."""

FORMATS: Final[Mapping[str, tuple[str, ...]]] = {
    CAUSAL_LM: ("completion", "chat", "text"),
    CLASSIFY: ("label",),
    TOKENS: ("words",),
    SEQ2SEQ: ("completion",),
}
"""The formats that each task can be trained on."""


@dataclass(frozen=True)
class Layout:
    """Columns that belong together.

    Attributes:
        name: the common name of the layout.
        keys: the columns that every row must have.
        format: the format of the rows: `completion`, `chat`, `label`, `words` or `text`.
        read: converts a row to that format; raises RowError.
        optional: further columns that are read if they are there.
        in_lists: whether the cells of the required columns are lists; None if either may be.
        reads_all: whether every further column is read, whatever its name.
    """

    name: str
    keys: tuple[str, ...]
    format: str
    read: Callable[[Row], RowValue]
    optional: tuple[str, ...] = ()
    in_lists: bool | None = None
    reads_all: bool = False

    def matches(self, row: Row) -> bool:
        """Return whether a row has the required columns, with cells of the right kind."""
        present = all(key in row for key in self.keys)
        return present and self.in_lists in (None, all(isinstance(row[key], list) for key in self.keys))

    def convert(self, row: Row) -> RowValue:
        """Convert a row to the format of the layout.

        Raises:
            RowError: the row does not match the layout.
        """
        missing = [key for key in self.keys if key not in row]
        if missing:
            raise RowError(f"{format_list(missing)} missing; the first row has it")
        return self.read(row)


_KEYS_THAT_COUNT: Final = ("label", "labels", PAIR, WEIGHT)
"""Columns that say what is learned; a layout that does not read them would learn something else."""
_KEYS_BEFORE_AN_ANSWER: Final = ("system", "history")
"""Columns that stand before the prompt in other tools: without them an answer is learned to another prompt."""


def list_columns_that_count(layout: Layout, row: Row) -> set[str]:
    """Return the columns of a row that say something which would change what is learned."""
    counting = {key for key in _KEYS_THAT_COUNT if row.get(key) is not None}
    if layout.format in ("label", "words", "text"):
        return counting
    return counting | {key for key in _KEYS_BEFORE_AN_ANSWER if row.get(key) not in (None, "", [])}


def reason_not_ignorable(layout: Layout, keys: Collection[str]) -> str | None:
    """Return which of the columns that count a layout does not read; None if it reads them all."""
    counting = [key for key in sorted(keys) if key not in (*layout.keys, *layout.optional)]
    if layout.reads_all or not counting:
        return None
    return f"the columns are {layout.name}, which does not read {format_list(counting)}"


def find_layout(row: Row) -> Layout | None:
    """Return the first layout that a row matches, or None."""
    return next((layout for layout in LAYOUTS if layout.matches(row)), None)


def _read_completion(row: Row) -> tuple[str, str]:
    return read_string("prompt", row["prompt"]), read_string("completion", row["completion"])


def _read_instruction(row: Row) -> tuple[str, str]:
    context = read_optional_string("input", row.get("input"))
    instruction = read_string("instruction", row["instruction"])
    return f"{instruction}\n\n{context}" if context else instruction, read_string("output", row["output"])


def _read_plain_text(row: Row) -> tuple[str]:
    return (read_string("text", row["text"]),)


LAYOUTS: Final = (
    Layout("prompt and completion", ("prompt", "completion"), "completion", _read_completion, in_lists=False),
    Layout(
        "prompt and completion as messages", ("prompt", "completion"), "chat", read_prompt_messages, CONVERSATION_KEYS
    ),
    Layout("instruction", ("instruction", "output"), "completion", _read_instruction, optional=("input",)),
    Layout("messages", ("messages",), "chat", read_messages, CONVERSATION_KEYS),
    Layout("ShareGPT conversations", ("conversations",), "chat", read_sharegpt, ("system", *CONVERSATION_KEYS)),
    Layout("text and label", ("text", "label"), "label", read_labeled_text, (PAIR, WEIGHT)),
    Layout("words and labels", ("words", "labels"), "words", read_tagged_words, optional=(WEIGHT,)),
    Layout("tokens and ner_tags", ("tokens", "ner_tags"), "words", read_ner_tags, optional=(WEIGHT,)),
    Layout("text and labels", ("text", "labels"), "label", read_text_with_labels, optional=(PAIR, WEIGHT)),
    Layout("text", ("text",), "text", _read_plain_text),
)
"""In order of precedence: the first one whose keys the first row has is the layout of the file."""
