"""Turn a text into the tokens that a model reads. Training and generation both use these functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from torch import Tensor
from torch.nn import functional

from lora_kit.models.protocols import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_SEPARATOR: Final = "\n"
"""Text between a prompt and its completion, in training and in generation, unless a recipe sets another."""


def render_prompt(prompt: str, *, separator: str = DEFAULT_SEPARATOR) -> str:
    """Return the text that a completion follows: the prompt and the separator."""
    return prompt + separator


def find_special_tokens(
    tokenizer: Tokenizer, *, side: Literal["text", "text_target"] = "text"
) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer adds before and after a text, as ([BOS], []), ([CLS], [SEP]) or ([], []).

    Args:
        tokenizer: of the base.
        side: `text_target` for texts that a decoder generates, which some tokenizers treat differently.
    """
    plain = tokenizer(**{side: "a"}, add_special_tokens=False)["input_ids"]
    full = tokenizer(**{side: "a"}, add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def tokenize_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a text without special tokens. The caller checks that the model can read so many."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def tokenize_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a rendered prompt: one BOS if the tokenizer adds one (never a second), no EOS."""
    prefix, _ = find_special_tokens(tokenizer)
    return [*prefix, *strip_special_tokens(tokenize_text(tokenizer, text), prefix, [])]


def tokenize_source(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens that an encoder reads: the text between the tokenizer's special tokens, each of them once."""
    prefix, suffix = find_special_tokens(tokenizer)
    return [*prefix, *strip_special_tokens(tokenize_text(tokenizer, text), prefix, suffix), *suffix]


def strip_special_tokens(ids: list[int], prefix: list[int], suffix: list[int]) -> list[int]:
    """Return the tokens of a text without special tokens at its ends that the text itself spells out."""
    ids = ids[len(prefix) :] if prefix and ids[: len(prefix)] == prefix else ids
    return ids[: -len(suffix)] if suffix and ids[-len(suffix) :] == suffix else ids


def cut_beginning(ids: list[int], prefix: list[int], budget: int) -> list[int]:
    """Return the last tokens of a prompt, at most `budget`, behind the special tokens that it begins with."""
    if len(ids) <= budget:
        return ids
    kept = prefix if ids[: len(prefix)] == prefix and len(prefix) < budget else []
    return kept + ids[len(ids) - (budget - len(kept)) :]


def prepare_decoder_inputs(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """Return the tokens that a decoder reads to predict these labels: int64 (rows, length), shifted right by one.

    Args:
        model: an encoder-decoder, whose own way of shifting is used where it has one.
        labels: int64 (rows, length), -100 where no loss is taken.
    """
    shift_labels = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift_labels is not None:
        shifted: Tensor = shift_labels(labels)
        return shifted
    start, pad = model.config.decoder_start_token_id, model.config.pad_token_id
    return functional.pad(labels[:, :-1], (1, 0), value=start).masked_fill(labels == -100, pad)
