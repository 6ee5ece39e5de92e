"""Preferences: which of two answers to a prompt is better, or whether one answer is good.

columns                                    format            value of a row
prompt, chosen, rejected                   preference        (row with the chosen answer, row with the rejected one)
the same as lists of messages              chat-preference   the same; without `prompt`, both hold whole conversations
prompt, completion, label (true or false)  feedback          (row with the completion, whether it is good)
the same as lists of messages              chat-feedback     the same

The rows in a value are rows of the format `completion`, or `chat`; of a conversation only the last answer counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

from lora_kit.data.cells import RowError
from lora_kit.data.layouts import Layout, RowValue, find_layout
from lora_kit.data.messages import Conversation
from lora_kit.data.prompt_rows import PROMPT_FORMATS
from lora_kit.data.read_messages import CONVERSATION_KEYS
from lora_kit.data.records import Row

PAIR_FORMATS: Final = ("preference", "chat-preference")
"""Formats whose rows hold a chosen and a rejected answer."""
FEEDBACK_FORMATS: Final = ("feedback", "chat-feedback")
"""Formats whose rows hold an answer, and whether it is good."""
_ANSWER_FORMATS: Final[Mapping[str, str]] = {
    "preference": "completion",
    "chat-preference": "chat",
    "feedback": "completion",
    "chat-feedback": "chat",
}
_PROMPT_ANSWERS: Final[Mapping[str, str]] = {"prompt": "completion", "chat-prompt": "chat"}
_VERDICTS: Final[Mapping[object, bool]] = {"true": True, "false": False, "1": True, "0": False, 1: True, 0: False}
"""Labels of `feedback`; a CSV file has them as words or numbers."""


def get_answer_format(row_format: str) -> str:
    """Return the format of the answers in, or to, rows of a format: `completion` or `chat`; others as they are."""
    return {**_ANSWER_FORMATS, **_PROMPT_ANSWERS}.get(row_format, row_format)


def get_first_answer(row_format: str, value: RowValue) -> RowValue:
    """Return the row in a value that holds its only or its chosen answer; a value of another format as it is."""
    first: RowValue = value[0] if row_format in _ANSWER_FORMATS else value
    return first


def is_preference(row_format: str) -> bool:
    """Return whether rows of a format are preferences."""
    return row_format in _ANSWER_FORMATS


def suggest_objective(row_format: str) -> str | None:
    """Return the usual objective that learns from rows of a format; None where it is `sft`."""
    if row_format in PROMPT_FORMATS:
        return "grpo"
    return ("dpo" if row_format in PAIR_FORMATS else "kto") if is_preference(row_format) else None


def describe_use(row_format: str) -> str:
    """Return what rows of preferences, or without answers, are for, as a hint; empty for other formats."""
    if row_format in PROMPT_FORMATS:
        return "these rows have no answer: objective: grpo learns from answers of the model's own"
    if not is_preference(row_format):
        return ""
    objectives = "dpo, orpo, kto or reward" if row_format in PAIR_FORMATS else "kto"
    return f"objective: {objectives} learns from these rows"


def find_preference_layout(row: Row) -> Layout | None:
    """Return the layout of a row of preferences; None for any other row."""
    if "chosen" in row and "rejected" in row:
        if isinstance(row["chosen"], list):
            return _CONVERSATION_PAIRS
        return _PAIRS if "prompt" in row else None
    if {"prompt", "completion", "label"} <= set(row) and _parse_verdict(row["label"]) is not None:
        return _CONVERSATION_FEEDBACK if isinstance(row["completion"], list) else _FEEDBACK
    return None


def preference_to_json(row_format: str, value: RowValue) -> dict[str, object]:
    """Return a row of preferences in the columns that it is read from."""
    answers = value[:1] if row_format in FEEDBACK_FORMATS else value
    if get_answer_format(row_format) == "chat":
        rows = [_conversation_to_json(conversation) for (conversation,) in answers]
    else:
        rows = [{"prompt": prompt, "completion": completion} for prompt, completion in answers]
    if row_format in FEEDBACK_FORMATS:
        return {**rows[0], "label": value[1]}
    shared = {key: cell for key, cell in rows[0].items() if key != "completion"}
    return {**shared, "chosen": rows[0]["completion"], "rejected": rows[1]["completion"]}


def _conversation_to_json(conversation: Conversation) -> dict[str, object]:
    """Return a conversation as columns, its last answer apart; which answers are learned follows from that."""
    messages = [dataclasses.replace(message, train=None).to_json() for message in conversation.messages]
    further = {key: cell for key, cell in conversation.to_json().items() if key != "messages"}
    return {"prompt": messages[:-1], "completion": messages[-1:], **further}


def _parse_verdict(label: object) -> bool | None:
    """Return whether a label says that the answer is good; None where it says neither."""
    key = label.strip().lower() if isinstance(label, str) else label
    return _VERDICTS.get(key) if isinstance(key, (str, int)) else None


def _read_text_pair(row: Row) -> RowValue:
    return _read_text(row, "chosen"), _read_text(row, "rejected")


def _read_conversation_pair(row: Row) -> RowValue:
    chosen, rejected = _read_conversation(row, "chosen"), _read_conversation(row, "rejected")
    if chosen[0].messages[:-1] != rejected[0].messages[:-1]:
        raise RowError("chosen and rejected differ before their last answer; each must be one answer to one prompt")
    return chosen, rejected


def _read_text_feedback(row: Row) -> RowValue:
    return _read_text(row, "completion"), _read_verdict(row)


def _read_conversation_feedback(row: Row) -> RowValue:
    return _read_conversation(row, "completion"), _read_verdict(row)


def _read_verdict(row: Row) -> bool:
    verdict = _parse_verdict(row["label"])
    if verdict is None:
        raise RowError(f"label must be true or false; {row['label']!r} was given")
    return verdict


def _read_text(row: Row, key: str) -> RowValue:
    """Return the row `prompt and completion` with the answer in a column."""
    if isinstance(row[key], list):
        raise RowError(f"{key} is a list of messages, and a text in the first row")
    return _convert({"prompt": row["prompt"], "completion": row[key]}, key)


def _read_conversation(row: Row, key: str) -> RowValue:
    """Return the row `messages` with the answer in a column as its last message, and nothing else learned."""
    answer, prompt = row[key], row.get("prompt")
    if not isinstance(answer, list) or not answer or not all(isinstance(message, dict) for message in answer):
        raise RowError(f"{key} must be a list of messages")
    if isinstance(prompt, list):
        messages = [*prompt, *answer]
    elif prompt is None or answer[0].get("role") != "assistant":  # a whole conversation; its prompt is said twice
        messages = answer
    else:
        messages = [{"role": "user", "content": prompt}, *answer]
    if not isinstance(messages[-1], dict) or messages[-1].get("role") != "assistant":
        raise RowError(f"the last message of {key} must be from the assistant")
    further = {name: row[name] for name in CONVERSATION_KEYS if row.get(name) is not None}
    marked = [*map(_exclude, messages[:-1]), {**messages[-1], "train": True}]
    return _convert({**further, "messages": marked}, key)


def _exclude(message: object) -> object:
    """Return a message whose answer is not learned."""
    is_answer = isinstance(message, dict) and message.get("role") == "assistant"
    return {**message, "train": False} if is_answer and isinstance(message, dict) else message


def _convert(row: Row, key: str) -> RowValue:
    """Return a row as the layout of its columns reads it; faults name the column of the answer."""
    layout = find_layout(row)
    assert layout is not None
    try:
        return layout.convert(row)
    except RowError as error:
        raise RowError(f"{key}: {error}", kind=error.kind) from None


_PAIRS: Final = Layout("prompt, chosen and rejected", ("prompt", "chosen", "rejected"), "preference", _read_text_pair)
_CONVERSATION_PAIRS: Final = Layout(
    "chosen and rejected conversations",
    ("chosen", "rejected"),
    "chat-preference",
    _read_conversation_pair,
    optional=("prompt", *CONVERSATION_KEYS),
)
_FEEDBACK: Final = Layout(
    "prompt, completion and label", ("prompt", "completion", "label"), "feedback", _read_text_feedback
)
_CONVERSATION_FEEDBACK: Final = Layout(
    "conversation and label",
    ("prompt", "completion", "label"),
    "chat-feedback",
    _read_conversation_feedback,
    optional=CONVERSATION_KEYS,
)
PREFERENCE_LAYOUTS: Final = (_PAIRS, _CONVERSATION_PAIRS, _FEEDBACK, _CONVERSATION_FEEDBACK)
"""Layouts of preferences; they are looked for before those of `lora_kit.data.layouts`."""
