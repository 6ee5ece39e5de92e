"""Texts and conversations of clients as tokens of a base, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_kit.adapter.adapter import Adapter
from lora_kit.data.cells import RowError
from lora_kit.data.label_columns import TextInput
from lora_kit.data.messages import Conversation
from lora_kit.data.read_messages import read_open_conversation
from lora_kit.data.sample_format import PromptStyle
from lora_kit.data.templates import ChatTemplate, find_chat_template
from lora_kit.data.text_tokens import TextTokens, tokenize_texts
from lora_kit.errors import DataError
from lora_kit.generation.prompts import (
    EncodedPrompt,
    encode_prompt,
    find_adapter_style,
    find_base_style,
    find_end_tokens,
)
from lora_kit.models.loading import Base
from lora_kit.models.prompt_tokens import tokenize_prompt, tokenize_source
from lora_kit.models.protocols import Tokenizer
from lora_kit.models.tasks import SEQ2SEQ
from lora_kit.serving.engine import RequestError


class PromptEncoder:
    """Encodes what clients give.

    Args:
        base: whose tokens these are.
        base_name: what the base is called, for messages.
    """

    def __init__(self, base: Base, *, base_name: str) -> None:
        self._base, self._base_name = base, base_name

    @property
    def tokenizer(self) -> Tokenizer:
        return self._base.tokenizer

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a text of the base."""
        return find_end_tokens(self._base)

    def encode_text(self, prompt: str | Sequence[int]) -> list[int]:
        """Return the tokens of a prompt as it is; token ids stay what they are.

        Raises:
            RequestError: it has none, or is not text.
        """
        encode = tokenize_source if self._base.task == SEQ2SEQ else tokenize_prompt
        ids = list(prompt) if not isinstance(prompt, str) else encode(self.tokenizer, _check_text(prompt))
        if not ids:
            raise RequestError("the prompt has no token", field="prompt", code="empty_prompt")
        return ids

    def encode_messages(
        self, messages: Sequence[Mapping[str, Any]], adapter: Adapter | None, variables: Mapping[str, Any] | None
    ) -> EncodedPrompt:
        """Return a conversation as an adapter saw conversations in training; else as the base's template has it.

        Raises:
            RequestError: a message is not one, or there is no template, or it rejects the conversation.
        """
        try:
            conversation = read_open_conversation({"messages": messages, "chat_template_kwargs": variables})
            return encode_prompt(self._base, *self._present(conversation, adapter))
        except (RowError, DataError) as error:
            raise RequestError(str(error), field="messages", code="invalid_messages") from None

    def _present(self, conversation: Conversation, adapter: Adapter | None) -> tuple[str | Conversation, PromptStyle]:
        """Return a conversation, and the style to present it in; for an adapter trained on prompts, its one message.

        Raises:
            RequestError: there is no template, and it is more than one message.
        """
        own = find_chat_template(self.tokenizer)
        style = find_adapter_style(adapter) if adapter is not None else find_base_style(self._base)
        if isinstance(style, ChatTemplate):
            return conversation, style
        if own:
            return conversation, ChatTemplate(own, f"the chat template of {self._base_name}")
        if not style or len(conversation.messages) != 1:
            raise RequestError(
                "this model has no chat template", field="messages", code="no_chat_template", hint="/v1/completions"
            )
        return conversation.messages[0].content, style

    def encode_labeled(self, texts: Sequence[TextInput], *, max_length: int) -> list[TextTokens]:
        """Return texts, or texts with a second one each, as a classifier reads them.

        Raises:
            RequestError: one is empty or not text, or some have a second text and others do not.
        """
        for text in texts:
            for part in (text,) if isinstance(text, str) else text:
                if not _check_text(part, field="input").strip():
                    raise RequestError("a text is empty", field="input", code="empty_prompt")
        if len({isinstance(text, str) for text in texts}) > 1:
            raise RequestError("some inputs have two texts, and others one", field="input", code="invalid_value")
        try:
            return list(tokenize_texts(texts, self.tokenizer, max_length=max_length))
        except DataError as error:
            raise RequestError(str(error), field="input", code="invalid_value") from None

    def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the tokens of a text."""
        _check_text(text)
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return [int(token) for token in ids]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of tokens.

        Raises:
            RequestError: one is not a token.
        """
        wrong = next((token for token in ids if not 0 <= token < len(self.tokenizer)), None)
        if wrong is not None:
            raise RequestError(f"{wrong} is not a token of this base", field="tokens", code="invalid_token")
        return self.tokenizer.decode(list(ids))


def _check_text(text: str, *, field: str = "prompt") -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError("the text is not valid UTF-8", field=field, code="invalid_text") from None
    return text
