"""How rows become samples: one value that training, planning, preparation, preview and evaluation share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from lora_kit.data.messages import ALL, Conversation, Message
from lora_kit.data.rows import Rows
from lora_kit.data.templates import ChatTemplate
from lora_kit.errors import DataError
from lora_kit.models.prompt_tokens import DEFAULT_SEPARATOR
from lora_kit.models.tasks import CAUSAL_LM, SINGLE_LABEL

DEFAULT_MAX_LENGTH: Final = 2048
"""Tokens of a sample, unless a recipe or the base sets a lower limit."""

PromptStyle = ChatTemplate | str
"""How a prompt is presented to a model: rendered by a chat template, or followed by a separator."""


@dataclass(frozen=True, kw_only=True)
class SampleFormat:
    """How rows become samples; rows that are encoded in one format by one tokenizer give the same tokens.

    Attributes:
        max_length: most tokens of a sample.
        separator: text between a prompt and its completion; not used for a prompt that an encoder reads.
        template: chat template; None without conversations.
        label2id: class of each label by its name; empty for rows without labels.
        learn: which answers of a conversation are learned; see `lora_kit.data.messages.LEARN`.
        task: task of the model; `seq2seq` means that an encoder reads prompts and a decoder writes completions.
        problem: what is predicted of a whole text, one of `lora_kit.models.tasks.PROBLEMS`.
        answer_tokens: of `max_length`, those that a prompt leaves to the answer that the model writes itself.
    """

    max_length: int
    separator: str = DEFAULT_SEPARATOR
    template: ChatTemplate | None = None
    label2id: Mapping[str, int] = field(default_factory=dict, hash=False)
    learn: str = ALL
    task: str = CAUSAL_LM
    problem: str = SINGLE_LABEL
    answer_tokens: int = 0

    @property
    def style(self) -> PromptStyle:
        """How prompts are presented to the model."""
        return self.template or self.separator

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the labels, in the order of their classes."""
        return tuple(sorted(self.label2id, key=self.label2id.__getitem__))


def convert_rows(rows: Rows, style: PromptStyle) -> Rows:
    """Convert prompts with completions to conversations of one exchange, or the reverse, as the style requires.

    Raises:
        DataError: a conversation of several exchanges, and the style is not a chat template.
    """
    if isinstance(style, ChatTemplate) and rows.format == "completion":
        values = tuple(
            (Conversation((Message("user", prompt), Message("assistant", completion))),)
            for prompt, completion in rows.values
        )
        return dataclasses.replace(rows, format="chat", values=values)
    if isinstance(style, str) and rows.format == "chat":
        for line, (conversation,) in zip(rows.lines, rows.values, strict=True):
            roles = [message.role for message in conversation.messages]
            if roles != ["user", "assistant"] or not conversation.is_plain:
                hint = "an adapter that was trained on conversations brings one"
                raise DataError(f"{rows.path}:{line}: a conversation, but there is no chat template for it", hint=hint)
        pairs = tuple(tuple(message.content for message in conversation.messages) for (conversation,) in rows.values)
        return dataclasses.replace(rows, format="completion", values=pairs)
    return rows
