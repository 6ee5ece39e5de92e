"""Nothing that a conversation says may be lost on its way through a chat template.

A text is looked for as it stands. What a template may write in its own way (the arguments of a call, the result of a
tool) counts as rendered if the rendered text changes with it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from typing import Final

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


def check_answer(
    template: ChatTemplate, tokenizer: Tokenizer, conversation: Conversation, index: int, text: str
) -> None:
    """Raise DataError unless a rendered answer says all that its message says.

    Args:
        text: the answer as rendered.
    """
    message = conversation.messages[index]
    thought, content = split_inline_thought(message.content)
    if message.content.strip() not in text and not (thought in text and content in text):
        raise DataError(f"{template.name} does not render the content of message {index + 1} as it is")
    if message.reasoning.strip() not in text:
        what = f"{template.name} does not render the reasoning of message {index + 1}"
        raise DataError(f"{what}, which would be lost")
    for name, count in Counter(call.name for call in message.tool_calls).items():
        if text.count(name) < count:
            raise DataError(f"{template.name} does not render every tool call of message {index + 1}")
    until = conversation.until(index + 1)
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
    for tool in conversation.tool_schemas or ():
        if str(get_tool_name(tool)) not in text:
            raise DataError(f"{template.name} does not render the tools, which would be lost")
    for index, message in enumerate(conversation.messages[:-1]):
        if message.role != "assistant" and message.content.strip() not in text:
            other = dataclasses.replace(message, content="another text")
            if not _changes(template, tokenizer, conversation, index, other):
                what = f"{template.name} does not render message {index + 1} ({message.role})"
                raise DataError(f"{what}, which would be lost")
        if message.name not in text and message.role != "tool":
            raise DataError(f"{template.name} does not render the name of message {index + 1}, which would be lost")


def _changes(
    template: ChatTemplate, tokenizer: Tokenizer, conversation: Conversation, index: int, other: Message
) -> bool:
    """Return whether a conversation is rendered differently with another message in one place."""
    messages = list(conversation.messages)
    messages[index] = other
    try:
        changed = template.render(tokenizer, conversation.with_messages(tuple(messages)))
    except DataError:
        return True
    return changed != template.render(tokenizer, conversation)
