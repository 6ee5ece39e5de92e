"""The one way a text becomes what a model reads, in training and in generation."""

from __future__ import annotations

from typing import Any, Final, Literal

from torch import Tensor
from torch.nn import functional

DEFAULT_SEPARATOR: Final = "\n"
"""What stands between a prompt and its completion, in training and in generation, unless a recipe says otherwise."""


def render_prompt(prompt: str, *, separator: str = DEFAULT_SEPARATOR) -> str:
    """The text a completion follows: the prompt and the separator. Training and generation both use exactly this."""
    return prompt + separator


def find_special_tokens(
    tokenizer: Any, *, side: Literal["text", "text_target"] = "text"
) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text: a BOS and nothing, `[CLS]` and `[SEP]`, or nothing at all.

    Args:
        side: `text_target` for texts that a decoder writes, which some tokenizers treat differently.
    """
    plain = tokenizer(**{side: "a"}, add_special_tokens=False)["input_ids"]
    full = tokenizer(**{side: "a"}, add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def tokenize_text(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text and nothing else; what is too long for the model is the caller's to see to."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def tokenize_prompt(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a rendered prompt: one BOS if the tokenizer adds one (never a second), no EOS."""
    prefix, _ = find_special_tokens(tokenizer)
    return [*prefix, *strip_special_tokens(tokenize_text(tokenizer, text), prefix, [])]


def tokenize_source(tokenizer: Any, text: str) -> list[int]:
    """Tokens of what an encoder reads: the text between the tokenizer's own special tokens, none of them doubled."""
    prefix, suffix = find_special_tokens(tokenizer)
    return [*prefix, *strip_special_tokens(tokenize_text(tokenizer, text), prefix, suffix), *suffix]


def strip_special_tokens(ids: list[int], prefix: list[int], suffix: list[int]) -> list[int]:
    """Tokens of a text without special tokens that it brings itself, where they would be put there anyway."""
    ids = ids[len(prefix) :] if prefix and ids[: len(prefix)] == prefix else ids
    return ids[: -len(suffix)] if suffix and ids[-len(suffix) :] == suffix else ids


def prepare_decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """What a decoder reads while it learns to write these labels: int64 (rows, length), shifted right.

    Args:
        labels: int64 (rows, length), -100 where there is none.
    """
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        shifted: Tensor = own(labels)
        return shifted
    start, pad = model.config.decoder_start_token_id, model.config.pad_token_id
    return functional.pad(labels[:, :-1], (1, 0), value=start).masked_fill(labels == -100, pad)
