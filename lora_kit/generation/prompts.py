"""How a prompt is put to a model: as the adapter that answers saw prompts in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_kit.adapter.adapter import Adapter
from lora_kit.data.chat import ChatTemplate
from lora_kit.data.layouts import Message
from lora_kit.errors import DataError
from lora_kit.models.loading import Base
from lora_kit.models.prompt_tokens import DEFAULT_SEPARATOR, render_prompt, tokenize_prompt, tokenize_source
from lora_kit.models.tasks import SEQ2SEQ

PromptStyle = ChatTemplate | str
"""In a chat template, or followed by a separator."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as a row of a batch: its text, its tokens, and the tokens that end an answer to it."""

    text: str
    ids: list[int]
    ends: frozenset[int]


def encode_prompt(base: Base, prompt: str | Sequence[Message], style: PromptStyle) -> EncodedPrompt:
    """A prompt, or a conversation so far, in the style of an adapter.

    Args:
        prompt: a conversation only where the style is a chat template.

    Raises:
        DataError: it is not text, or has no token.
    """
    tokenizer, ends = base.tokenizer, end_tokens_of(base)
    if isinstance(style, ChatTemplate):
        messages = [("user", prompt)] if isinstance(prompt, str) else prompt
        text = style.asked(tokenizer, [(role, _require_utf8(content)) for role, content in messages])
        # The template has put a BOS where there is to be one.
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ends |= {style.end(tokenizer)}
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


def end_tokens_of(base: Base) -> frozenset[int]:
    """The tokens that end a text: those of the model and that of the tokenizer."""
    own = getattr(base.model.generation_config, "eos_token_id", None)
    ids = own if isinstance(own, list) else [own]
    return frozenset(int(token) for token in (*ids, base.tokenizer.eos_token_id) if token is not None)


# What the record of an adapter says


def resolve_styles(adapters: Sequence[Adapter | None], *, base_alone: PromptStyle) -> list[PromptStyle]:
    """Each adapter's own; the base's is that of the first adapter beside it."""
    own = [None if adapter is None else template_of(adapter) or separator_of(adapter) for adapter in adapters]
    first = next((style for style in own if style is not None), base_alone)
    return [first if style is None else style for style in own]


def separator_of(adapter: Adapter) -> str:
    """The text between prompt and completion in the adapter's training.

    Empty for an adapter whose record does not say how it was trained: nothing is known of its prompts.
    """
    data = data_of(adapter)
    if data is None:
        return ""
    separator = data.get("separator")
    return separator if isinstance(separator, str) else DEFAULT_SEPARATOR


def template_of(adapter: Adapter) -> ChatTemplate | None:
    """The chat template of the adapter's training, if it was trained on conversations."""
    text = (data_of(adapter) or {}).get("chat_template")
    return ChatTemplate(text, "the chat template in the adapter's record") if isinstance(text, str) else None


def data_of(adapter: Adapter) -> Mapping[str, Any] | None:
    """What the record says about the data of the training; None where it does not speak of one."""
    recipe: Any = adapter.record.get("recipe")
    if not isinstance(recipe, Mapping):
        return None
    data = recipe.get("data")
    return data if isinstance(data, Mapping) else {}
