"""Prompts as tokens, in the style in which an adapter saw prompts in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.use_record import find_recorded_data
from lora_kit.data.answer_ends import find_template_ends
from lora_kit.data.messages import Conversation, Message
from lora_kit.data.sample_format import PromptStyle
from lora_kit.data.templates import ChatTemplate
from lora_kit.errors import DataError
from lora_kit.models.loading import Base
from lora_kit.models.prompt_tokens import (
    DEFAULT_SEPARATOR,
    render_prompt,
    tokenize_prompt,
    tokenize_source,
    tokenize_text,
)
from lora_kit.models.tasks import SEQ2SEQ

_ADAPTER_TEMPLATE: Final = "the chat template in the adapter's record"


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as a row of a batch.

    Attributes:
        text: the prompt as the model reads it.
        ids: its tokens.
        ends: the tokens that end a completion of it.
    """

    text: str
    ids: list[int]
    ends: frozenset[int]


def encode_prompt(base: Base, prompt: str | Conversation, style: PromptStyle) -> EncodedPrompt:
    """Encode a prompt, or a conversation so far, in the style of an adapter.

    Args:
        prompt: a conversation only if the style is a chat template.

    Raises:
        DataError: the prompt is not text, or has no token.
    """
    tokenizer, ends = base.tokenizer, find_end_tokens(base)
    if isinstance(style, ChatTemplate):
        conversation = Conversation((Message("user", prompt),)) if isinstance(prompt, str) else prompt
        text = _require_utf8(style.render_prompt(tokenizer, conversation))
        # The template decides about the BOS.
        ids = tokenize_text(tokenizer, text)
        ends |= find_template_ends(style, tokenizer)
    else:
        assert isinstance(prompt, str)
        text = render_prompt(_require_utf8(prompt), separator=style)
        ids = tokenize_source(tokenizer, text) if base.task == SEQ2SEQ else tokenize_prompt(tokenizer, text)
    if not ids:
        raise DataError("the prompt has no token", hint="give some text to go on from")
    return EncodedPrompt(text, ids, ends)


def _require_utf8(prompt: str) -> str:
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("the prompt is not valid UTF-8") from None
    return prompt


def find_end_tokens(base: Base) -> frozenset[int]:
    """Return the tokens that end a text: those of the model and that of the tokenizer."""
    own = getattr(base.model.generation_config, "eos_token_id", None)
    ids = own if isinstance(own, list) else [own]
    return frozenset(int(token) for token in (*ids, base.tokenizer.eos_token_id) if token is not None)


# The record of an adapter


def resolve_styles(base: Base, adapters: Sequence[Adapter | None]) -> list[PromptStyle]:
    """Return the style of each adapter; the base (None) has that of the first adapter beside it, alone its own."""
    styles = [None if adapter is None else find_adapter_style(adapter) for adapter in adapters]
    default = next((style for style in styles if style is not None), None)
    default = find_base_style(base) if default is None else default
    return [default if style is None else style for style in styles]


def find_adapter_style(adapter: Adapter) -> PromptStyle:
    """Return how prompts were presented in the adapter's training: the chat template, else the separator."""
    return _find_style(adapter.record, _ADAPTER_TEMPLATE)


def find_base_style(base: Base) -> PromptStyle:
    """Return how prompts are presented to a base alone: as in its training, where its folder says it; else as they are.

    A model that was merged, or trained in every weight, says it.
    """
    return _find_style(base.record, f"the chat template of {base.name}")


def find_separator(adapter: Adapter) -> str:
    """Return the text between prompt and completion in the adapter's training.

    It is empty for an adapter whose record does not say how it was trained: nothing is known of its prompts.
    """
    return _find_separator(adapter.record)


def find_template(adapter: Adapter) -> ChatTemplate | None:
    """Return the chat template of the adapter's training, or None if it was not trained on conversations."""
    return build_recorded_template(find_training_data(adapter) or {}, _ADAPTER_TEMPLATE)


def build_recorded_template(data: Mapping[str, object], name: str) -> ChatTemplate | None:
    """Return the chat template in the `data` section of a resolved recipe, or None if it has none."""
    text, variables = data.get("chat_template"), data.get("chat_template_kwargs")
    if not isinstance(text, str):
        return None
    return ChatTemplate(text, name, variables if isinstance(variables, Mapping) else {})


def find_training_data(adapter: Adapter) -> Mapping[str, object] | None:
    """Return the `data` section of the recipe in an adapter's record; None if the record has no recipe."""
    return find_recorded_data(adapter.record)


def _find_style(record: Mapping[str, object], name: str) -> PromptStyle:
    return build_recorded_template(find_recorded_data(record) or {}, name) or _find_separator(record)


def _find_separator(record: Mapping[str, object]) -> str:
    data = find_recorded_data(record)
    if data is None:
        return ""
    separator = data.get("separator")
    return separator if isinstance(separator, str) else DEFAULT_SEPARATOR
