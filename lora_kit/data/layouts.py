"""Layouts: which columns a file has, and which of the five training formats its rows become.

layout                             format       value of a row
prompt, completion                 completion   (prompt, completion)
instruction, [input], output       completion   (instruction, then an empty line and the input if any; output)
messages: [{role, content}]        chat         (((role, content), …),); see `AnnotatedMessage` for further keys
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

from lora_kit.data.cells import RowError, read_list, read_optional_string, read_string
from lora_kit.data.label_columns import read_labeled_text, read_ner_tags, read_tagged_words
from lora_kit.data.records import BAD, EMPTY, Row
from lora_kit.errors import format_list, suggest_nearest
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
_UNSUPPORTED_KEYS: Final = ("tool_calls", "function_call", "tool_call_id", "name")
"""Keys that change what a message says, so ignoring a value of them would be wrong."""
_LOSS_KEYS: Final = ("train", "loss", "weight")
"""Keys that say whether an answer is learned: true or 1, false or 0."""
_REASONING_KEYS: Final = ("reasoning_content", "thinking", "reasoning")
"""Keys under which data sets keep what the assistant thought before its answer."""


class AnnotatedMessage(tuple[str, str]):
    """A message that says more than role and content; otherwise it is (role, content).

    Attributes:
        reasoning: what the assistant thought before its answer; empty without any.
        is_learned: whether the loss is taken on this message if it is an answer.
    """

    reasoning: str
    is_learned: bool

    def __new__(cls, role: str, content: str, *, reasoning: str = "", is_learned: bool = True) -> AnnotatedMessage:
        message = super().__new__(cls, (role, content))
        message.reasoning, message.is_learned = reasoning, is_learned
        return message

    def __getnewargs_ex__(self) -> tuple[tuple[str, ...], dict[str, object]]:
        return tuple(self), {"reasoning": self.reasoning, "is_learned": self.is_learned}

    def _identity(self) -> tuple[object, ...]:
        return (*self, self.reasoning, self.is_learned)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AnnotatedMessage) and self._identity() == other._identity()

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._identity())


def get_reasoning(message: Message) -> str:
    """Return what the assistant thought before this answer; empty without any."""
    return message.reasoning if isinstance(message, AnnotatedMessage) else ""


def is_learned_answer(message: Message) -> bool:
    """Return whether the loss is taken on a message: it is the assistant's, and nothing excludes it."""
    return message[0] == "assistant" and getattr(message, "is_learned", True)


def message_to_json(message: Message) -> dict[str, object]:
    """Return a message in the layout `messages`."""
    role, content = message
    reasoning = {"reasoning_content": get_reasoning(message)} if get_reasoning(message) else {}
    excluded = {"train": False} if role == "assistant" and not is_learned_answer(message) else {}
    return {"role": role, "content": content, **reasoning, **excluded}


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


def _read_completion(row: Row) -> tuple[str, str]:
    return read_string("prompt", row["prompt"]), read_string("completion", row["completion"])


def _read_instruction(row: Row) -> tuple[str, str]:
    context = read_optional_string("input", row.get("input"))
    instruction = read_string("instruction", row["instruction"])
    return f"{instruction}\n\n{context}" if context else instruction, read_string("output", row["output"])


def _read_plain_text(row: Row) -> tuple[str]:
    return (read_string("text", row["text"]),)


def _read_messages(row: Row) -> tuple[tuple[Message, ...]]:
    return (_build_conversation(_read_message_list(row, "messages", "role", "content", _ROLES)),)


def _read_sharegpt(row: Row) -> tuple[tuple[Message, ...]]:
    messages = _read_message_list(row, "conversations", "from", "value", _SHAREGPT_ROLES)
    system = read_optional_string("system", row.get("system"))
    return (_build_conversation([("system", system), *messages] if system else messages),)


def _read_message_list(row: Row, key: str, role_key: str, content_key: str, roles: Mapping[str, str]) -> list[Message]:
    return [_read_message(number, item, role_key, content_key, roles) for number, item in read_list(row, key)]


def _read_message(number: int, item: object, role_key: str, content_key: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(item, dict) or role_key not in item or content_key not in item:
        raise RowError(f"message {number} must have {role_key} and {content_key}")
    _check_message_keys(number, item, (role_key, content_key))
    role = item[role_key]
    if not isinstance(role, str) or role not in roles:
        raise RowError(f"message {number} is from {role!r}, which is not one of {format_list(list(roles))}")
    content = read_string(f"message {number} ({role})", item[content_key])
    reasoning, is_learned = _read_reasoning(number, item, roles[role]), _read_loss_keys(number, item)
    if not reasoning and is_learned:
        return roles[role], content
    return AnnotatedMessage(roles[role], content, reasoning=reasoning, is_learned=is_learned)


def _check_message_keys(number: int, item: Row, required: tuple[str, str]) -> None:
    """Raise RowError for a key that would be lost: an unsupported one with a value, or an unknown one."""
    values = {key: value for key, value in item.items() if value is not None}  # Parquet has every key in every row
    unsupported = [key for key in _UNSUPPORTED_KEYS if values.get(key) not in (None, "", [], {})]
    if unsupported:
        raise RowError(f"message {number} has {format_list(unsupported)}, which cannot be trained on yet")
    known = (*required, *_LOSS_KEYS, *_REASONING_KEYS, *_UNSUPPORTED_KEYS)
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        nearest = suggest_nearest(unknown[0], known) or f"known are {format_list(known, most=len(known))}"
        raise RowError(f"message {number} has the key {unknown[0]!r}, which is not known; {nearest}")


def _read_loss_keys(number: int, item: Row) -> bool:
    """Return whether a message is learned if it is an answer: unless one of the keys excludes it."""
    for key in _LOSS_KEYS:
        value = item.get(key)
        if value not in (None, 0, 1):
            expected = "0 or 1" if key == "weight" else "true or false"
            raise RowError(f"message {number}: {key} must be {expected}; {value!r} was given")
    return not any(item.get(key) is not None and not item[key] for key in _LOSS_KEYS)


def _read_reasoning(number: int, item: Row, role: str) -> str:
    """Return what the assistant thought; empty without any."""
    values = {key: item.get(key) for key in _REASONING_KEYS}
    keys = [key for key, value in values.items() if value is not None and str(value).strip()]  # blank: no reasoning
    if not keys:
        return ""
    if role != "assistant":
        raise RowError(f"message {number} has {keys[0]}, but it is not from the assistant")
    if len({str(item[key]) for key in keys}) > 1:
        raise RowError(f"message {number} has {format_list(keys)} with different values; give one of them")
    return read_string(f"message {number}: {keys[0]}", item[keys[0]])


def _build_conversation(messages: Sequence[Message]) -> tuple[Message, ...]:
    if not any(role == "assistant" for role, _ in messages):
        kind = BAD if messages else EMPTY
        raise RowError("no message is from the assistant, so there is nothing to learn", kind=kind)
    if messages[0][0] == "assistant":
        # No prompt precedes it, so it is never generated: it is context of what follows.
        role, content = messages[0]
        opening = AnnotatedMessage(role, content, reasoning=get_reasoning(messages[0]), is_learned=False)
        messages = [opening, *messages[1:]]
        if not any(role == "assistant" for role, _ in messages[1:]):
            raise RowError("the only answer is the first message, so there is nothing to learn")
    if not any(map(is_learned_answer, messages)):
        raise RowError(f"{format_list(_LOSS_KEYS)} exclude every answer, so there is nothing to learn")
    late = [number for number, (role, _) in enumerate(messages, start=1) if role == "system" and number > 1]
    if late:
        raise RowError(f"message {late[0]} is from the system; only the first may be")
    return tuple(messages)


LAYOUTS: Final = (
    Layout("prompt and completion", ("prompt", "completion"), "completion", _read_completion),
    Layout("instruction", ("instruction", "output"), "completion", _read_instruction, optional=("input",)),
    Layout("messages", ("messages",), "chat", _read_messages),
    Layout("ShareGPT conversations", ("conversations",), "chat", _read_sharegpt, optional=("system",)),
    Layout("text and label", ("text", "label"), "label", read_labeled_text),
    Layout("words and labels", ("words", "labels"), "words", read_tagged_words),
    Layout("tokens and ner_tags", ("tokens", "ner_tags"), "words", read_ner_tags),
    Layout("text", ("text",), "text", _read_plain_text),
)
"""In order of precedence: the first one whose keys the first row has is the layout of the file."""
