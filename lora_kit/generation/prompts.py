"""Prompts as tokens, in the style in which an adapter saw prompts in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_kit.adapter.adapter import Adapter
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


def resolve_styles(adapters: Sequence[Adapter | None], *, base_alone: PromptStyle) -> list[PromptStyle]:
    """Return the style of each adapter; the base (None) has that of the first adapter beside it.

    Args:
        base_alone: the style of the base if there is no adapter.
    """
    styles = [None if adapter is None else find_adapter_style(adapter) for adapter in adapters]
    default = next((style for style in styles if style is not None), base_alone)
    return [default if style is None else style for style in styles]


def find_adapter_style(adapter: Adapter) -> PromptStyle:
    """Return how prompts were presented in the adapter's training: the chat template, else the separator."""
    return find_template(adapter) or find_separator(adapter)


def find_separator(adapter: Adapter) -> str:
    """Return the text between prompt and completion in the adapter's training.

    It is empty for an adapter whose record does not say how it was trained: nothing is known of its prompts.
    """
    data = find_training_data(adapter)
    if data is None:
        return ""
    separator = data.get("separator")
    return separator if isinstance(separator, str) else DEFAULT_SEPARATOR


def find_template(adapter: Adapter) -> ChatTemplate | None:
    """Return the chat template of the adapter's training, or None if it was not trained on conversations."""
    return build_recorded_template(find_training_data(adapter) or {}, "the chat template in the adapter's record")


def build_recorded_template(data: Mapping[str, object], name: str) -> ChatTemplate | None:
    """Return the chat template in the `data` section of a resolved recipe, or None if it has none."""
    text, variables = data.get("chat_template"), data.get("chat_template_kwargs")
    if not isinstance(text, str):
        return None
    return ChatTemplate(text, name, variables if isinstance(variables, Mapping) else {})


def find_training_data(adapter: Adapter) -> Mapping[str, object] | None:
    """Return the `data` section of the recipe in an adapter's record; None if the record has no recipe."""
    recipe = adapter.record.get("recipe")
    if not isinstance(recipe, Mapping):
        return None
    data = recipe.get("data")
    return data if isinstance(data, Mapping) else {}
