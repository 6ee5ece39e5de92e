"""Nothing that a conversation says may be lost on its way through a chat template.

A text is looked for as it stands, beside whatever else says the same: a thought that the answer repeats has to be there
twice. What a template may write in its own way (the arguments of a call, the result of a tool) counts as rendered if
the rendered text changes with it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Final

from lora_kit.data.answer_ends import try_render
from lora_kit.data.messages import Conversation, Message
from lora_kit.data.read_messages import get_tool_name
from lora_kit.data.templates import ChatTemplate
from lora_kit.errors import DataError
from lora_kit.models.protocols import Tokenizer

_INLINE_THOUGHT: Final = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


def split_inline_thought(content: str) -> tuple[str, str]:
    """Return what an answer thinks in its own content, between `<think>` and `</think>`, and the rest of it."""
    match = _INLINE_THOUGHT.fullmatch(content)
    return (match[1].strip(), match[2].strip()) if match else ("", content.strip())


def contains_reasoning(message: Message, text: str) -> bool:
    """Return whether a text says what an answer thinks, beside its content and calls; true where it thinks nothing."""
    thought, content = split_inline_thought(message.content)
    return _contains_beside((message.reasoning or thought).strip(), [content, *_list_call_texts(message)], text)


def _contains_content(message: Message, text: str) -> bool:
    """Return whether a text says the content of an answer, beside its thought and calls."""
    thought, content = split_inline_thought(message.content)
    rendered = message.content.strip() in text or (thought in text and content in text)
    return rendered and _contains_beside(content, [message.reasoning or thought, *_list_call_texts(message)], text)


def _list_call_texts(message: Message) -> list[str]:
    return [part for call in message.tool_calls for part in (call.name, call.arguments)]


def _contains_beside(part: str, others: Iterable[str], text: str) -> bool:
    """Return whether a text contains a part once more than the others do; true if the part is empty."""
    return not part or text.count(part) > sum(other.count(part) for other in others)


def check_answer(
    template: ChatTemplate, tokenizer: Tokenizer, conversation: Conversation, index: int, text: str
) -> None:
    """Raise DataError unless a rendered answer says all that its message says.

    Args:
        text: the answer as rendered.
    """
    message, until = conversation.messages[index], conversation.until(index + 1)
    if not _contains_content(message, text):
        other = dataclasses.replace(message, content="another text")
        if message.content.strip() not in text or not _changes(template, tokenizer, until, index, other):
            raise DataError(f"{template.name} does not render the content of message {index + 1} as it is")
    if not contains_reasoning(message, text):
        what = f"{template.name} does not render the reasoning of message {index + 1}"
        raise DataError(f"{what}, which would be lost")
    for name, count in Counter(call.name for call in message.tool_calls).items():
        if text.count(name) < count:
            raise DataError(f"{template.name} does not render every tool call of message {index + 1}")
    for number, call in enumerate(message.tool_calls):
        if json.loads(call.arguments):
            calls = list(message.tool_calls)
            calls[number] = dataclasses.replace(call, arguments="{}")
            other = dataclasses.replace(message, tool_calls=tuple(calls))
            if not _changes(template, tokenizer, until, index, other):
                raise DataError(f"{template.name} does not render the arguments of the calls of message {index + 1}")


def check_context(template: ChatTemplate, tokenizer: Tokenizer, conversation: Conversation, text: str) -> None:
    """Raise DataError if a template passes over something that stands before an answer.

    Earlier answers may be shortened: generation is not given more of them either.

    Args:
        conversation: through the last answer.
        text: the conversation as rendered.
    """
    _check_tools(template, tokenizer, conversation, text)
    contents = [message.content for message in conversation.messages]
    for index, message in enumerate(conversation.messages[:-1]):
        others = [*contents[:index], *contents[index + 1 :]]
        if message.role != "assistant" and not _contains_beside(message.content.strip(), others, text):
            other = dataclasses.replace(message, content="another text")
            if not _changes(template, tokenizer, conversation, index, other):
                what = f"{template.name} does not render message {index + 1} ({message.role})"
                raise DataError(f"{what}, which would be lost")
        if message.role != "tool" and not _contains_beside(message.name, contents, text):
            other = dataclasses.replace(message, name="another")
            if not _changes(template, tokenizer, conversation, index, other):
                raise DataError(f"{template.name} does not render the name of message {index + 1}, which would be lost")


def _check_tools(template: ChatTemplate, tokenizer: Tokenizer, conversation: Conversation, text: str) -> None:
    """Raise DataError unless the tools are rendered, and not only the calls of them."""
    names = [str(get_tool_name(tool)) for tool in conversation.tool_schemas or ()]
    if not names:
        return
    bare = try_render(template, tokenizer, dataclasses.replace(conversation, tools=""))
    if any(text.count(name) <= bare.count(name) for name in names):
        raise DataError(f"{template.name} does not render the tools, which would be lost")


def _changes(
    template: ChatTemplate, tokenizer: Tokenizer, conversation: Conversation, index: int, other: Message
) -> bool:
    """Return whether a conversation is rendered differently with another message in one place."""
    messages = list(conversation.messages)
    messages[index] = other
    changed = try_render(template, tokenizer, conversation.with_messages(tuple(messages)))
    return changed != template.render(tokenizer, conversation)
