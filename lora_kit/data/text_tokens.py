"""Texts, pairs of texts and words as the tokens of an encoder: with its special tokens, cut where they are too long."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from lora_kit.data.label_columns import TextInput
from lora_kit.data.row_encoders import compute_token_budget, tokenize_batches
from lora_kit.errors import DataError
from lora_kit.models.prompt_tokens import DEFAULT_SEPARATOR, find_special_tokens, tokenize_text
from lora_kit.models.protocols import Tokenizer

_PROBE: Final = "a"


@dataclass(frozen=True)
class TextTokens:
    """A text, or a pair of texts, as a model reads it.

    Attributes:
        ids: the tokens.
        length: how many there were before anything was cut.
        types: which of two texts each token belongs to; None where the tokenizer does not say, or there is one text.
        first_tokens: of words: the index of the first token of each that was not cut off, by its number from 1.
        tokenless: of words: the numbers of those without a token of their own.
    """

    ids: list[int]
    length: int
    types: list[int] | None = None
    first_tokens: Mapping[int, int] = field(default_factory=dict)
    tokenless: tuple[int, ...] = ()

    @property
    def is_cut(self) -> bool:
        """Whether tokens were cut off."""
        return len(self.ids) < self.length


def tokenize_texts(texts: Sequence[TextInput], tokenizer: Tokenizer, *, max_length: int) -> Iterator[TextTokens]:
    """Yield each text, or pair of texts, between the tokenizer's special tokens; what is too long loses its end.

    Of two texts the longer one loses tokens first, as in transformers' `longest_first`. Where a tokenizer puts nothing
    between two texts, a line break stands there.

    Args:
        texts: all of them texts, or all of them pairs of texts.
        max_length: most tokens of a text with the special ones.

    Raises:
        DataError: `max_length` leaves no token beside the special ones.
    """
    if texts and isinstance(texts[0], tuple):
        yield from _tokenize_pairs([(text[0], text[1]) for text in texts], tokenizer, max_length)
        return
    prefix, suffix = find_special_tokens(tokenizer)
    budget = compute_token_budget(max_length, prefix, suffix)
    for ids in tokenize_batches(tokenizer, [text for text in texts if isinstance(text, str)]):
        yield TextTokens([*prefix, *ids[:budget], *suffix], len(prefix) + len(ids) + len(suffix))


# Pairs


@dataclass(frozen=True)
class _PairFrame:
    """The special tokens around and between two texts, and the type of each token.

    Attributes:
        prefix: tokens before the first text.
        middle: tokens between the texts.
        suffix: tokens after the second text.
        types: the types of prefix, first text, middle, second text and suffix; None where the tokenizer gives none.
    """

    prefix: list[int]
    middle: list[int]
    suffix: list[int]
    types: tuple[list[int], int, list[int], int, list[int]] | None

    def join(self, first: list[int], second: list[int], *, max_length: int) -> TextTokens:
        """Return two texts as one sample."""
        budget = max_length - len(self.prefix) - len(self.middle) - len(self.suffix)
        length = max_length - budget + len(first) + len(second)
        kept, other = _cut_longest(len(first), len(second), budget)
        first, second = first[:kept], second[:other]
        ids = [*self.prefix, *first, *self.middle, *second, *self.suffix]
        if self.types is None:
            return TextTokens(ids, length)
        before, one, between, two, after = self.types
        return TextTokens(ids, length, [*before, *[one] * len(first), *between, *[two] * len(second), *after])


def _tokenize_pairs(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, max_length: int) -> Iterator[TextTokens]:
    frame = _find_pair_frame(tokenizer)
    if compute_token_budget(max_length, [*frame.prefix, *frame.middle], frame.suffix) < 2:
        raise DataError(f"max_length {max_length} leaves no token for each of two texts")
    firsts = tokenize_batches(tokenizer, [pair[0] for pair in pairs])
    seconds = tokenize_batches(tokenizer, [pair[1] for pair in pairs])
    for first, second in zip(firsts, seconds, strict=True):
        yield frame.join(first, second, max_length=max_length)


def _find_pair_frame(tokenizer: Tokenizer) -> _PairFrame:
    """Return what the tokenizer puts around two texts, from two of one letter each."""
    encoding = tokenizer(_PROBE, _PROBE, add_special_tokens=True)
    full: list[int] = encoding["input_ids"]
    types: list[int] = encoding.get("token_type_ids") or []
    text = tokenize_text(tokenizer, _PROBE)
    starts = [at for at in range(len(full) - len(text) + 1) if full[at : at + len(text)] == text]
    if len(starts) < 2 or starts[0] + len(text) > starts[-1]:
        raise DataError("the tokenizer cannot encode a pair of texts", hint="join the two in the column text")
    first, second, size = starts[0], starts[-1], len(text)
    prefix, middle, suffix = full[:first], full[first + size : second], full[second + size :]
    if not middle:
        # Nothing would tell where the first text ends, and some have no special tokens for two texts.
        prefix, suffix = find_special_tokens(tokenizer)
        return _PairFrame(prefix, tokenize_text(tokenizer, DEFAULT_SEPARATOR), suffix, None)
    if not any(types):
        return _PairFrame(prefix, middle, suffix, None)
    parts = (types[:first], types[first], types[first + size : second], types[second], types[second + size :])
    return _PairFrame(prefix, middle, suffix, parts)


def _cut_longest(first: int, second: int, budget: int) -> tuple[int, int]:
    """Return how many tokens two texts keep: the longer one loses tokens until it is the shorter one or both fit."""
    if first + second <= budget:
        return first, second
    shorter = min(first, second, budget // 2)
    longer = budget - shorter
    return (shorter, longer) if first <= second else (longer, shorter)


# Words


def tokenize_words(words: Sequence[str], tokenizer: Tokenizer, *, max_length: int) -> TextTokens:
    """Return words as running text, one space between them, as a text is read in use.

    Raises:
        DataError: the tokenizer does not report offsets, or `max_length` leaves no token beside the special ones.
    """
    if not tokenizer.is_fast:
        raise DataError("the tokenizer does not report the offsets of its tokens, so words would lose their labels")
    prefix, suffix = find_special_tokens(tokenizer)
    budget = compute_token_budget(max_length, prefix, suffix)
    tokens = tokenizer(" ".join(words), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = tokens["input_ids"]
    firsts = find_first_tokens(words, tokens["offset_mapping"])
    return TextTokens(
        [*prefix, *ids[:budget], *suffix],
        len(prefix) + len(ids) + len(suffix),
        first_tokens={number: len(prefix) + token for number, token in firsts.items() if token < budget},
        tokenless=tuple(number for number in range(1, len(words) + 1) if number not in firsts),
    )


def find_first_tokens(words: Sequence[str], spans: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Return the index of the first token of each word, by the number of the word, from 1.

    Words without a token of their own are left out.

    Args:
        spans: where each token begins and ends in the joined words; a token may include the space before its word.
    """
    firsts: dict[int, int] = {}
    token = start = 0
    for number, word in enumerate(words, start=1):
        end = start + len(word)
        while token < len(spans) and (spans[token][1] <= start or spans[token][0] < start - 1):
            token += 1
        if token < len(spans) and spans[token][0] < end:
            firsts[number] = token
            token += 1
        start = end + 1
    return firsts
