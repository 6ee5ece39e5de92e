"""What the columns of a file mean: layouts that people write, and the five formats that are trained on.

layout                             format       value of a row
prompt, completion                 completion   (prompt, completion)
instruction, [input], output       completion   (instruction, an empty line and the input if there is one; output)
messages: [{role, content}]        chat         (((role, content), …),)
conversations: [{from, value}]     chat         the same; `system` beside it is the first message
text, label                        label        (text, label)
words, labels                      words        ((word, …), (label, …))
tokens, ner_tags                   words        the same
text                               text         (text,)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lora_kit.data.readers import BAD, EMPTY
from lora_kit.errors import format_list
from lora_kit.models.tasks import CAUSAL_LM, CLASSIFY, SEQ2SEQ, TOKENS

Row = Mapping[str, Any]
Message = tuple[str, str]
"""Role and content."""

FORMATS: Final[Mapping[str, tuple[str, ...]]] = {
    CAUSAL_LM: ("completion", "chat", "text"),
    CLASSIFY: ("label",),
    TOKENS: ("words",),
    SEQ2SEQ: ("completion",),
}
"""The formats that each task is trained on."""

ROLES: Final = ("system", "user", "assistant")
_SHAREGPT_ROLES: Final[Mapping[str, str]] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_UNSUPPORTED_KEYS: Final = ("tool_calls", "function_call", "weight", "tool_call_id")
"""Keys of a message that change what it says or whether it is trained on, so that they cannot be passed over."""


class RowError(ValueError):
    """A row that is not of its layout.

    Attributes:
        kind: `bad`, or `empty` where all that is wrong is that a text is not there.
    """

    def __init__(self, what: str, *, kind: str = BAD) -> None:
        super().__init__(what)
        self.kind = kind


@dataclass(frozen=True)
class Layout:
    """Columns that are found together.

    Attributes:
        name: what people call them.
        keys: those that must be there.
        format: what the rows become: `completion`, `chat`, `label`, `words` or `text`.
        read: the value of a row in that format; raises RowError.
        optional: further keys that are read if they are there.
    """

    name: str
    keys: tuple[str, ...]
    format: str
    read: Callable[[Row], tuple[Any, ...]]
    optional: tuple[str, ...] = ()

    def value(self, row: Row) -> tuple[Any, ...]:
        """A row in the format of the layout.

        Raises:
            RowError: it is not one.
        """
        missing = [key for key in self.keys if key not in row]
        if missing:
            raise RowError(f"{format_list(missing)} missing; the first row has it")
        return self.read(row)


def layout_of(keys: Sequence[str]) -> Layout | None:
    """The first layout all of whose keys are there."""
    return next((layout for layout in LAYOUTS if set(layout.keys) <= set(keys)), None)


def _read_string(name: str, value: Any) -> str:
    """A text with something other than white space in it."""
    if value is None or (isinstance(value, str) and not value.strip()):
        what = f"{name} is empty" if value is not None else f"{name} must be a string; NoneType was given"
        raise RowError(what, kind=EMPTY)
    if not isinstance(value, str):
        raise RowError(f"{name} must be a string; {type(value).__name__} was given")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"{name} holds half a surrogate pair, which is not text") from None
    return value


def _read_optional_string(name: str, value: Any) -> str:
    """A text, or an empty string where there is none."""
    return "" if value is None or value == "" else _read_string(name, value)


def _read_completion(row: Row) -> tuple[str, str]:
    return _read_string("prompt", row["prompt"]), _read_string("completion", row["completion"])


def _read_instruction(row: Row) -> tuple[str, str]:
    given = _read_optional_string("input", row.get("input"))
    instruction = _read_string("instruction", row["instruction"])
    return f"{instruction}\n\n{given}" if given else instruction, _read_string("output", row["output"])


def _read_labeled_text(row: Row) -> tuple[str, str | int]:
    return _read_string("text", row["text"]), _read_label("label", row["label"])


def _read_label(name: str, value: Any) -> str | int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if value is not None and not isinstance(value, str):
        raise RowError(f"{name} must be a string or a whole number; {type(value).__name__} was given")
    return _read_string(name, value)


def _read_tagged_words(row: Row, words: str, labels: str) -> tuple[tuple[str, ...], tuple[str | int, ...]]:
    given, tags = _read_list(row, words), _read_list(row, labels)
    if len(given) != len(tags):
        raise RowError(f"{len(given)} {words} and {len(tags)} {labels}; each word has one")
    if not given:
        raise RowError(f"{words} is empty", kind=EMPTY)
    return (
        tuple(_read_string(f"{words} {number}", item) for number, item in given),
        tuple(_read_label(f"{labels} {number}", item) for number, item in tags),
    )


def _read_words(row: Row) -> tuple[tuple[str, ...], tuple[str | int, ...]]:
    return _read_tagged_words(row, "words", "labels")


def _read_ner(row: Row) -> tuple[tuple[str, ...], tuple[str | int, ...]]:
    return _read_tagged_words(row, "tokens", "ner_tags")


def _read_plain_text(row: Row) -> tuple[str]:
    return (_read_string("text", row["text"]),)


def _read_messages(row: Row) -> tuple[tuple[Message, ...]]:
    known = {role: role for role in ROLES}
    return (
        _build_conversation(
            [_read_message(n, item, "role", "content", known) for n, item in _read_list(row, "messages")]
        ),
    )


def _read_sharegpt(row: Row) -> tuple[tuple[Message, ...]]:
    found = [_read_message(n, item, "from", "value", _SHAREGPT_ROLES) for n, item in _read_list(row, "conversations")]
    system = _read_optional_string("system", row.get("system"))
    return (_build_conversation([("system", system), *found] if system else found),)


def _read_list(row: Row, key: str) -> list[tuple[int, Any]]:
    items = row[key]
    if not isinstance(items, list):
        raise RowError(f"{key} must be a list; {type(items).__name__} was given")
    return list(enumerate(items, start=1))


def _read_message(number: int, item: Any, who: str, what: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(item, dict) or who not in item or what not in item:
        raise RowError(f"message {number} must have {who} and {what}")
    changed = [key for key in _UNSUPPORTED_KEYS if item.get(key) is not None]
    if changed:
        raise RowError(f"message {number} has {format_list(changed)}, which cannot be trained on yet")
    role = item[who]
    if not isinstance(role, str) or role not in roles:
        raise RowError(f"message {number} is from {role!r}, which is not one of {format_list(list(roles))}")
    return roles[role], _read_string(f"message {number} ({role})", item[what])


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
"""The first one all of whose keys the first row has is the layout of the file."""
