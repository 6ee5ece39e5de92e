"""Conversations as values: messages, the tools they may call, and what a chat template is given besides.

role        says                                    further keys
system      how the assistant shall behave          name
developer   the same, for templates that know it    name
user        the questions                           name
assistant   the answers                             reasoning_content, tool_calls, train, name
tool        what a tool gave back                   name, tool_call_id
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Final

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
"""Whom a message may be from."""
INSTRUCTIONS: Final = ("system", "developer")
"""Roles that may only begin a conversation."""
ALL, LAST, MARKED = "all", "last", "marked"
LEARN: Final = (ALL, LAST, MARKED)
"""Which answers are learned: all that nothing excludes, the last of these, or those that say `train: true`."""


@dataclass(frozen=True)
class ToolCall:
    """A call that the assistant makes.

    Attributes:
        name: the function.
        arguments: a JSON object, as text.
        id: what the result of the call refers to; empty without one.
    """

    name: str
    arguments: str = "{}"
    id: str = ""

    def to_json(self, *, arguments_as_text: bool = False) -> dict[str, object]:
        """Return the call as templates and files have it.

        Args:
            arguments_as_text: keep the arguments as JSON text, which some templates need.
        """
        arguments = self.arguments if arguments_as_text else json.loads(self.arguments)
        identity = {"id": self.id} if self.id else {}
        return {**identity, "type": "function", "function": {"name": self.name, "arguments": arguments}}


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: one of `ROLES`.
        content: the text; empty only where tools are called, or where a tool gave nothing back.
        reasoning: what the assistant thought before its answer; empty without any.
        tool_calls: the calls that the assistant makes after its content.
        name: the name of the speaker or of the tool; empty without one.
        tool_call_id: the call that a tool answers; empty without one.
        train: whether the row says that this answer is learned; None if it says nothing.
    """

    role: str
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    tool_call_id: str = ""
    train: bool | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the message is nothing but a role and a text."""
        return self == Message(self.role, self.content)

    def to_json(self) -> dict[str, object]:
        """Return the message in the layout `messages`, without what it does not say."""
        further = {
            "reasoning_content": self.reasoning,
            "tool_calls": [call.to_json(arguments_as_text=True) for call in self.tool_calls],
            "name": self.name,
            "tool_call_id": self.tool_call_id,
        }
        marks = {} if self.train is None else {"train": self.train}
        return {"role": self.role, "content": self.content, **{k: v for k, v in further.items() if v}, **marks}


@dataclass(frozen=True)
class Conversation:
    """Messages, and what their template is given beside them.

    Attributes:
        messages: in their order.
        tools: the tools that may be called: a JSON list of their schemas, as text; empty without any.
        template_kwargs: variables of the chat template here: a JSON object, as text; empty without any.
    """

    messages: tuple[Message, ...]
    tools: str = ""
    template_kwargs: str = ""

    @property
    def tool_schemas(self) -> list[dict[str, object]] | None:
        """The tools as templates take them; None without any."""
        return json.loads(self.tools) if self.tools else None

    @property
    def variables(self) -> dict[str, object]:
        """The variables of the chat template."""
        return json.loads(self.template_kwargs) if self.template_kwargs else {}

    @property
    def is_plain(self) -> bool:
        """Whether the conversation is nothing but roles and texts."""
        return not (self.tools or self.template_kwargs) and all(message.is_plain for message in self.messages)

    @property
    def input_text(self) -> str:
        """All that precedes the last answer, as one text: what two rows with the same input have in common."""
        last = max(index for index, message in enumerate(self.messages) if message.role == "assistant")
        calls = [call.name + call.arguments for message in self.messages[:last] for call in message.tool_calls]
        return "\n".join([*(message.content for message in self.messages[:last]), *calls, self.tools])

    def until(self, end: int) -> Conversation:
        """Return the conversation before the message of this index."""
        return self.with_messages(self.messages[:end])

    def with_messages(self, messages: tuple[Message, ...]) -> Conversation:
        """Return the conversation with other messages."""
        return dataclasses.replace(self, messages=messages)

    def to_json(self) -> dict[str, object]:
        """Return the conversation as a row of the layout `messages`."""
        row: dict[str, object] = {"messages": [message.to_json() for message in self.messages]}
        if self.tools:
            row["tools"] = self.tools
        if self.template_kwargs:
            row["chat_template_kwargs"] = self.template_kwargs
        return row


def find_learned_answers(conversation: Conversation, learn: str = ALL) -> list[int]:
    """Return the indices of the answers that are learned.

    The first message is never among them: no prompt precedes it, so it is never generated.

    Args:
        learn: one of `LEARN`.
    """
    answers = [
        index
        for index, message in enumerate(conversation.messages)
        if index and message.role == "assistant" and message.train is not False
    ]
    if learn == MARKED:
        return [index for index in answers if conversation.messages[index].train]
    return answers[-1:] if learn == LAST else answers
