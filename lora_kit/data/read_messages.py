"""Read conversations from rows: every key of a message is honored, or its row is a fault that names it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Final

from lora_kit.data.cells import RowError, read_list, read_optional_string, read_string
from lora_kit.data.message_rows import ROLE_SYNONYMS
from lora_kit.data.messages import INSTRUCTIONS, ROLES, Conversation, Message, ToolCall, find_learned_answers
from lora_kit.data.records import BAD, EMPTY, Row
from lora_kit.errors import format_list, suggest_nearest

CONVERSATION_KEYS: Final = ("tools", "chat_template_kwargs")
"""Columns that belong to a whole conversation."""
_ROLES: Final[Mapping[str, str]] = {role: role for role in ROLES} | {"function": "tool"}
_SHAREGPT_ROLES: Final[Mapping[str, str]] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_LOSS_KEYS: Final = ("train", "loss", "weight")
"""Keys that say whether an answer is learned: true or 1, false or 0."""
_REASONING_KEYS: Final = ("reasoning_content", "thinking", "reasoning")
"""Keys under which data sets keep what the assistant thought before its answer."""
_CALL_KEYS: Final = ("tool_calls", "function_call")
_NAME_KEYS: Final = ("name", "tool_call_id")


def read_messages(row: Row) -> tuple[Conversation]:
    """Read a row of the layout `messages`: a list of `role`, `content`."""
    return (_build_conversation(row, _read_message_list(row, "messages", "role", "content")),)


def read_sharegpt(row: Row) -> tuple[Conversation]:
    """Read a row of the layout `conversations`: a list of `from`, `value`, or of `role`, `content`."""
    first = row["conversations"][0] if isinstance(row["conversations"], list) and row["conversations"] else {}
    keys = ("role", "content") if isinstance(first, dict) and "role" in first else ("from", "value")
    messages = _read_message_list(row, "conversations", *keys)
    system = read_optional_string("system", row.get("system"))
    return (_build_conversation(row, [Message("system", system), *messages] if system else messages),)


def read_open_conversation(row: Row) -> Conversation:
    """Read the messages, tools and variables of a conversation that an answer shall follow.

    Raises:
        RowError: there are none, or the last one is an answer already.
    """
    messages = _read_message_list(row, "messages", "role", "content")
    if not messages or messages[-1].role == "assistant":
        raise RowError("the last message must be one that can be answered", kind=BAD if messages else EMPTY)
    return Conversation(tuple(messages), _read_tools(row.get("tools")), _read_variables(row))


def read_prompt_messages(row: Row) -> tuple[Conversation]:
    """Read a row of `prompt` and `completion` as lists of messages: the answers of the completion are learned."""
    context = _read_message_list(row, "prompt", "role", "content")
    learned = _read_message_list(row, "completion", "role", "content")
    if not any(message.role == "assistant" for message in learned):
        raise RowError("no message of the completion is from the assistant, so there is nothing to learn")
    excluded = [
        dataclasses.replace(message, train=False) if message.role == "assistant" else message for message in context
    ]
    return (_build_conversation(row, [*excluded, *learned]),)


def _read_message_list(row: Row, key: str, role_key: str, content_key: str) -> list[Message]:
    roles = _SHAREGPT_ROLES if role_key == "from" else _ROLES
    return [_read_message(number, item, role_key, content_key, roles) for number, item in read_list(row, key)]


def _read_message(number: int, item: object, role_key: str, content_key: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(item, dict) or role_key not in item or not {content_key, *_CALL_KEYS} & {*item}:
        raise RowError(f"message {number} must have {role_key} and {content_key}")
    values = {key: value for key, value in item.items() if value is not None}  # Parquet has every key in every row
    _check_message_keys(number, values, (role_key, content_key))
    role = values.get(role_key)
    if not isinstance(role, str) or role not in roles:
        what = f"message {number} is from {role!r}, which is not one of {format_list(list(roles))}"
        meant = ROLE_SYNONYMS.get(str(role).lower())
        raise RowError(f"{what}; lora-kit prepare makes it {meant!r}" if meant else what)
    where = f"message {number} ({roles[role]})"
    if role == "function_call":  # the value is the call itself
        calls = _read_json_calls(where, values.pop(content_key, None))
    else:
        calls = _read_calls(where, values)
    is_trained = _read_loss_keys(number, values)
    message = Message(
        role=roles[role],
        content=_read_content(where, values.get(content_key), may_be_empty=bool(calls) or roles[role] == "tool"),
        reasoning=_read_reasoning(number, values),
        tool_calls=calls,
        name=read_optional_string(f"{where}: name", values.get("name")),
        tool_call_id=read_optional_string(f"{where}: tool_call_id", values.get("tool_call_id")),
        train=is_trained if roles[role] == "assistant" else None,
    )
    _check_role(number, values, message)
    return message


def _check_message_keys(number: int, values: Row, required: tuple[str, str]) -> None:
    known = (*required, *_LOSS_KEYS, *_REASONING_KEYS, *_CALL_KEYS, *_NAME_KEYS)
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        nearest = suggest_nearest(unknown[0], known) or f"prepare --rename {unknown[0]}= takes it out"
        raise RowError(f"a message has the key {unknown[0]!r}, which is not known; {nearest}")


def _check_role(number: int, values: Row, message: Message) -> None:
    """Raise RowError for what only another role may say."""
    if message.role != "assistant":
        key = next((key for key in (*_REASONING_KEYS, *_CALL_KEYS) if values.get(key) not in (None, "", [], {})), None)
        if key and (message.reasoning or message.tool_calls):
            raise RowError(f"message {number} has {key}, but it is not from the assistant")
    if message.tool_call_id and message.role != "tool":
        raise RowError(f"message {number} has tool_call_id, but it is not from a tool")


def _read_content(where: str, value: object, *, may_be_empty: bool) -> str:
    """Return a text; parts of text are joined as they stand.

    Raises:
        RowError: the content is missing, no text, or holds a part that is no text, such as an image.
    """
    if isinstance(value, list):
        value = "".join(_read_part(where, number, part) for number, part in enumerate(value, start=1))
    if may_be_empty and (value is None or (isinstance(value, str) and not value.strip())):
        return ""
    return read_string(where, value)


def _read_part(where: str, number: int, part: object) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or not isinstance(kind := part.get("type"), str):
        raise RowError(f"{where}: part {number} of the content must be a text, or have type and text")
    if kind != "text":
        raise RowError(f"{where}: part {number} of the content is of type {kind!r}; only text can be trained on")
    unknown = [str(key) for key, value in part.items() if key not in ("type", "text") and value is not None]
    if unknown or not isinstance(part.get("text"), str):
        raise RowError(f"{where}: part {number} of the content must have type and text, and nothing else")
    return str(part["text"])


def _read_loss_keys(number: int, values: Row) -> bool | None:
    """Return whether a message is learned if it is an answer; None if it does not say."""
    for key in _LOSS_KEYS:
        if key in values and values[key] not in (0, 1):
            expected = "0 or 1" if key == "weight" else "true or false"
            raise RowError(f"message {number}: {key} must be {expected}; {values[key]!r} was given")
    given = [bool(values[key]) for key in _LOSS_KEYS if key in values]
    return all(given) if given else None


def _read_reasoning(number: int, values: Row) -> str:
    """Return what the assistant thought; empty without any."""
    keys = [key for key in _REASONING_KEYS if str(values.get(key, "")).strip()]  # blank: no reasoning
    if not keys:
        return ""
    if len({str(values[key]) for key in keys}) > 1:
        raise RowError(f"message {number} has {format_list(keys)} with different values; give one of them")
    return read_string(f"message {number}: {keys[0]}", values[keys[0]])


# Tools


def _read_calls(where: str, values: Row) -> tuple[ToolCall, ...]:
    given = values.get("tool_calls") or []
    legacy = values.get("function_call") or None
    if not isinstance(given, list):
        raise RowError(f"{where}: tool_calls must be a list; {type(given).__name__} was given")
    if given and legacy:
        raise RowError(f"{where} has tool_calls and function_call; give one of them")
    items = given or ([legacy] if legacy else [])
    return tuple(_read_call(f"{where}: tool call {number}", item) for number, item in enumerate(items, start=1))


def _read_json_calls(where: str, value: object) -> tuple[ToolCall, ...]:
    """Read calls from JSON: one object, or a list of them."""
    parsed = _parse_json(f"{where}: the call", read_string(where, value))
    items = parsed if isinstance(parsed, list) else [parsed]
    return tuple(_read_call(f"{where}: tool call {number}", item) for number, item in enumerate(items, start=1))


def _read_call(where: str, item: object) -> ToolCall:
    """Read a call as OpenAI writes it, or bare: `name` and `arguments`."""
    if not isinstance(item, dict):
        raise RowError(f"{where} must be an object; {type(item).__name__} was given")
    function = item.get("function", item)
    if not isinstance(function, dict):
        raise RowError(f"{where}: function must be an object; {type(function).__name__} was given")
    kind = item.get("type")
    if kind not in (None, "function"):
        raise RowError(f"{where} is of type {kind!r}; only functions can be called")
    known = {"id", "type", "index", "function"} if function is not item else {"id", "type", "name", "arguments"}
    unknown = [key for key in item if key not in known] + [
        key for key in function if key not in (*known, "name", "arguments")
    ]
    if unknown:
        raise RowError(f"{where} has the key {str(unknown[0])!r}, which is not known; it has name and arguments")
    return ToolCall(
        name=read_string(f"{where}: name", function.get("name")),
        arguments=_read_arguments(f"{where}: arguments", function.get("arguments")),
        id=read_optional_string(f"{where}: id", item.get("id")),
    )


def _read_arguments(where: str, value: object) -> str:
    """Return arguments as JSON text; they may be JSON text already, as OpenAI has them."""
    if value is None or value == "":
        return "{}"
    parsed = _parse_json(where, value) if isinstance(value, str) else value
    if not isinstance(parsed, dict):
        raise RowError(f"{where} must be an object; {type(parsed).__name__} was given")
    return json.dumps(parsed, ensure_ascii=False)


def _parse_json(where: str, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{where}: not JSON: {error}") from None


# The whole conversation


def _build_conversation(row: Row, messages: Sequence[Message]) -> Conversation:
    """Build a conversation of messages and the columns that belong to it.

    Raises:
        RowError: there is nothing to learn, instructions come late, or a column is invalid.
    """
    conversation = Conversation(tuple(messages), _read_tools(row.get("tools")), _read_variables(row))
    if not any(message.role == "assistant" for message in messages):
        kind = BAD if messages else EMPTY
        raise RowError("no message is from the assistant, so there is nothing to learn", kind=kind)
    if not any(message.role == "assistant" for message in messages[1:]):
        raise RowError("the only answer is the first message, so there is nothing to learn")
    if not find_learned_answers(conversation):
        raise RowError(f"{format_list(_LOSS_KEYS)} exclude every answer, so there is nothing to learn")
    for number, message in enumerate(messages[1:], start=2):
        if message.role in INSTRUCTIONS and messages[number - 2].role not in INSTRUCTIONS:
            raise RowError(f"message {number} is from the {message.role}; only the first may be")
    return conversation


def _read_tools(value: object) -> str:
    """Return the tools as JSON text; empty without any."""
    parsed = _parse_json("tools", value) if isinstance(value, str) and value.strip() else value
    if parsed in (None, "", [], {}):
        return ""
    if not isinstance(parsed, list) or not all(isinstance(tool, dict) for tool in parsed):
        raise RowError("tools must be a list of JSON schemas, or its text")
    for number, tool in enumerate(parsed, start=1):
        read_string(f"tool {number}: name", get_tool_name(tool))
    return _dump_json("tools", parsed)


def get_tool_name(tool: Mapping[str, object]) -> object:
    """Return the name of a tool in its schema, as OpenAI nests it or bare."""
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, dict) else None


def _read_variables(row: Row) -> str:
    """Return the variables of the chat template as JSON text; empty without any."""
    value = row.get("chat_template_kwargs")
    parsed = _parse_json("chat_template_kwargs", value) if isinstance(value, str) and value.strip() else value
    if parsed in (None, "", {}):
        return ""
    if not isinstance(parsed, dict):
        raise RowError(f"chat_template_kwargs must be an object; {type(parsed).__name__} was given")
    present = {key: value for key, value in parsed.items() if value is not None}
    return _dump_json("chat_template_kwargs", present) if present else ""


def _dump_json(where: str, value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"{where} is not JSON: {error}") from None
