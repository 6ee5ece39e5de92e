"""Layouts: which columns a file has, and which of the five training formats its rows become.

layout                             format       value of a row
prompt, completion                 completion   (prompt, completion)
instruction, [input], output       completion   (instruction, then an empty line and the input if any; output)
messages: [{role, content}]        chat         (((role, content), …),)
conversations: [{from, value}]     chat         the same; the first message may be in a column of its own, `system`
text, label                        label        (text, label)
words, labels                      words        ((word, …), (label, …))
tokens, ner_tags                   words        the same
text                               text         (text,)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lora_kit.data.records import BAD, EMPTY, Row
from lora_kit.errors import format_list
from lora_kit.models.tasks import CAUSAL_LM, CLASSIFY, SEQ2SEQ, TOKENS

Message = tuple[str, str]
"""Role and content."""
RowValue = tuple[Any, ...]
"""A row in its format; the table above lists its values."""

FORMATS: Final[Mapping[str, tuple[str, ...]]] = {
    CAUSAL_LM: ("completion", "chat", "text"),
    CLASSIFY: ("label",),
    TOKENS: ("words",),
    SEQ2SEQ: ("completion",),
}
"""The formats that each task can be trained on."""

_ROLES: Final[Mapping[str, str]] = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES: Final[Mapping[str, str]] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_UNSUPPORTED_KEYS: Final = ("tool_calls", "function_call", "weight", "tool_call_id")
"""Keys that change what a message says or whether it is trained on, so ignoring them would be wrong."""


class RowError(ValueError):
    """A row that does not match its layout.

    Attributes:
        kind: `bad`, or `empty` if the only fault is a missing text.
    """

    def __init__(self, message: str, *, kind: str = BAD) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Layout:
    """Columns that belong together.

    Attributes:
        name: the common name of the layout.
        keys: the columns that every row must have.
        format: the format of the rows: `completion`, `chat`, `label`, `words` or `text`.
        read: converts a row to that format; raises RowError.
        optional: further columns that are read if they are there.
    """

    name: str
    keys: tuple[str, ...]
    format: str
    read: Callable[[Row], RowValue]
    optional: tuple[str, ...] = ()

    def convert(self, row: Row) -> RowValue:
        """Convert a row to the format of the layout.

        Raises:
            RowError: the row does not match the layout.
        """
        missing = [key for key in self.keys if key not in row]
        if missing:
            raise RowError(f"{format_list(missing)} missing; the first row has it")
        return self.read(row)


def find_layout(keys: Sequence[str]) -> Layout | None:
    """Return the first layout of which all required keys are present, or None."""
    return next((layout for layout in LAYOUTS if set(layout.keys) <= set(keys)), None)


def _read_string(name: str, value: object) -> str:
    """Return a text that holds more than white space."""
    if value is None:
        raise RowError(f"{name} must be a string; NoneType was given", kind=EMPTY)
    if isinstance(value, str) and not value.strip():
        raise RowError(f"{name} is empty", kind=EMPTY)
    if not isinstance(value, str):
        raise RowError(f"{name} must be a string; {type(value).__name__} was given")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"{name} holds half a surrogate pair, which is not text") from None
    return value


def _read_optional_string(name: str, value: object) -> str:
    """Return a text, or an empty string without one."""
    return "" if value is None or value == "" else _read_string(name, value)


def _read_completion(row: Row) -> tuple[str, str]:
    return _read_string("prompt", row["prompt"]), _read_string("completion", row["completion"])


def _read_instruction(row: Row) -> tuple[str, str]:
    context = _read_optional_string("input", row.get("input"))
    instruction = _read_string("instruction", row["instruction"])
    return f"{instruction}\n\n{context}" if context else instruction, _read_string("output", row["output"])


def _read_labeled_text(row: Row) -> tuple[str, str | int]:
    return _read_string("text", row["text"]), _read_label("label", row["label"])


def _read_label(name: str, value: object) -> str | int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if value is not None and not isinstance(value, str):
        raise RowError(f"{name} must be a string or a whole number; {type(value).__name__} was given")
    return _read_string(name, value)


def _read_tagged_words(row: Row, words_key: str, labels_key: str) -> tuple[tuple[str, ...], tuple[str | int, ...]]:
    words, labels = _read_list(row, words_key), _read_list(row, labels_key)
    if len(words) != len(labels):
        raise RowError(f"{len(words)} {words_key} and {len(labels)} {labels_key}; each word has one")
    if not words:
        raise RowError(f"{words_key} is empty", kind=EMPTY)
    return (
        tuple(_read_string(f"{words_key} {number}", item) for number, item in words),
        tuple(_read_label(f"{labels_key} {number}", item) for number, item in labels),
    )


def _read_words(row: Row) -> tuple[tuple[str, ...], tuple[str | int, ...]]:
    return _read_tagged_words(row, "words", "labels")


def _read_ner(row: Row) -> tuple[tuple[str, ...], tuple[str | int, ...]]:
    return _read_tagged_words(row, "tokens", "ner_tags")


def _read_plain_text(row: Row) -> tuple[str]:
    return (_read_string("text", row["text"]),)


def _read_messages(row: Row) -> tuple[tuple[Message, ...]]:
    return (_build_conversation(_read_message_list(row, "messages", "role", "content", _ROLES)),)


def _read_sharegpt(row: Row) -> tuple[tuple[Message, ...]]:
    messages = _read_message_list(row, "conversations", "from", "value", _SHAREGPT_ROLES)
    system = _read_optional_string("system", row.get("system"))
    return (_build_conversation([("system", system), *messages] if system else messages),)


def _read_message_list(row: Row, key: str, role_key: str, content_key: str, roles: Mapping[str, str]) -> list[Message]:
    return [_read_message(number, item, role_key, content_key, roles) for number, item in _read_list(row, key)]


def _read_list(row: Row, key: str) -> list[tuple[int, object]]:
    """Return the items of a list, numbered from 1."""
    items = row[key]
    if not isinstance(items, list):
        raise RowError(f"{key} must be a list; {type(items).__name__} was given")
    return list(enumerate(items, start=1))


def _read_message(number: int, item: object, role_key: str, content_key: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(item, dict) or role_key not in item or content_key not in item:
        raise RowError(f"message {number} must have {role_key} and {content_key}")
    unsupported = [key for key in _UNSUPPORTED_KEYS if item.get(key) is not None]
    if unsupported:
        raise RowError(f"message {number} has {format_list(unsupported)}, which cannot be trained on yet")
    role = item[role_key]
    if not isinstance(role, str) or role not in roles:
        raise RowError(f"message {number} is from {role!r}, which is not one of {format_list(list(roles))}")
    return roles[role], _read_string(f"message {number} ({role})", item[content_key])


def _build_conversation(messages: Sequence[Message]) -> tuple[Message, ...]:
    if not any(role == "assistant" for role, _ in messages):
        kind = BAD if messages else EMPTY
        raise RowError("no message is from the assistant, so there is nothing to learn", kind=kind)
    late = [number for number, (role, _) in enumerate(messages, start=1) if role == "system" and number > 1]
    if late:
        raise RowError(f"message {late[0]} is from the system; only the first may be")
    return tuple(messages)


LAYOUTS: Final = (
    Layout("prompt and completion", ("prompt", "completion"), "completion", _read_completion),
    Layout("instruction", ("instruction", "output"), "completion", _read_instruction, optional=("input",)),
    Layout("messages", ("messages",), "chat", _read_messages),
    Layout("ShareGPT conversations", ("conversations",), "chat", _read_sharegpt, optional=("system",)),
    Layout("text and label", ("text", "label"), "label", _read_labeled_text),
    Layout("words and labels", ("words", "labels"), "words", _read_words),
    Layout("tokens and ner_tags", ("tokens", "ner_tags"), "words", _read_ner),
    Layout("text", ("text",), "text", _read_plain_text),
)
"""In order of precedence: the first one whose keys the first row has is the layout of the file."""
