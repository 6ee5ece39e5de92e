"""The tokens of a sample, and the positions of its loss, for each format.

    completion   [BOS] prompt separator | completion EOS      loss on everything after the bar
    chat         as the chat template renders it              loss on every answer and the token that ends it
    text         [BOS] text EOS                               loss on all but the first token, which nothing predicts
    label        text with the tokenizer's own special tokens loss on the label
    words        the words as one text, encoded like `label`  loss on the first token of each word that has a label

Prompt and completion are tokenized separately and joined, so the boundary is the same in training and in generation.
The first token of a sample never carries the label of a token before it: labels other than `IGNORE_INDEX` are exactly
the tokens that are predicted. With `task="seq2seq"` the two stay apart:

    completion   prompt with special tokens → completion EOS  loss on everything after the arrow
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from lora_kit.data.batches import IGNORE_INDEX
from lora_kit.data.cells import RowError
from lora_kit.data.chat import ChatEncoder
from lora_kit.data.records import LONG
from lora_kit.data.rows import Rows
from lora_kit.data.sample_format import SampleFormat
from lora_kit.errors import DataError, format_list
from lora_kit.models.prompt_tokens import find_special_tokens, render_prompt, strip_special_tokens
from lora_kit.models.protocols import Tokenizer

_TOKENIZER_BATCH: Final = 1024
"""Rows that the tokenizer encodes at once."""
_TOKENIZER_CHARACTERS: Final = 2**20
"""Characters that the tokenizer encodes at once, unless one text has more: each takes it some 150 bytes."""


@dataclass(frozen=True)
class EncodedRow:
    """A row as samples.

    Attributes:
        length: tokens of the row before anything was cut.
        samples: tokens and labels of each sample; none if there is an error.
        cut: whether the row was cut or became several samples.
        divided: whether it became several samples because its template renders earlier answers differently later on.
        error: why the row cannot be trained on; None if it can.
    """

    length: int
    samples: Sequence[tuple[list[int], list[int]]] = ()
    cut: bool = False
    divided: bool = False
    error: RowError | None = None


RowEncoder = Callable[[Rows, Tokenizer, SampleFormat], Iterator[EncodedRow]]
"""Encodes the rows of one format, in order; raises DataError if none of them can be encoded."""


def encode_completions(rows: Rows, tokenizer: Tokenizer, sample_format: SampleFormat) -> Iterator[EncodedRow]:
    """Encode prompts with completions for a decoder: a long prompt loses its beginning, a completion nothing."""
    eos = _find_eos(tokenizer)
    prefix, _ = find_special_tokens(tokenizer)
    texts = [render_prompt(value[0], separator=sample_format.separator) for value in rows.values]
    prompts = _tokenize_batches(tokenizer, texts)
    completions = _tokenize_batches(tokenizer, [value[1] for value in rows.values])
    for raw_prompt, raw_completion in zip(prompts, completions, strict=True):
        completion = _append_eos(raw_completion, eos)
        prompt = strip_special_tokens(raw_prompt, prefix, [])
        length = len(prefix) + len(prompt) + len(completion)
        budget = sample_format.max_length - len(prefix) - len(completion)
        # Without a token before it, the first label would be predicted by nothing.
        if budget < 0 or not (prefix or (prompt and budget)):
            yield EncodedRow(length, error=_build_completion_error(completion, sample_format))
            continue
        source = prefix + prompt[max(0, len(prompt) - budget) :]
        labels = [IGNORE_INDEX] * len(source) + completion
        yield EncodedRow(length, [(source + completion, labels)], cut=len(prompt) > budget)


def encode_conversations(rows: Rows, tokenizer: Tokenizer, sample_format: SampleFormat) -> Iterator[EncodedRow]:
    """Encode conversations: a long one is split between exchanges; see `ChatEncoder`."""
    if sample_format.template is None:
        raise DataError(f"{rows.path} holds conversations, and no chat template was given")
    template, limit = sample_format.template, sample_format.max_length
    encoder = ChatEncoder(tokenizer, template, max_length=limit, learn=sample_format.learn)
    for (conversation,) in rows.values:
        try:
            encoded = encoder.encode(conversation)
        except RowError as error:
            yield EncodedRow(0, error=error)
            continue
        labeled = [
            (
                each.ids,
                [token if has_loss else IGNORE_INDEX for token, has_loss in zip(each.ids, each.loss_mask, strict=True)],
            )
            for each in encoded.samples
        ]
        yield EncodedRow(encoded.length, labeled, cut=encoded.is_cut, divided=encoded.is_divided)


def encode_plain_texts(rows: Rows, tokenizer: Tokenizer, sample_format: SampleFormat) -> Iterator[EncodedRow]:
    """Encode texts without a prompt: a long one becomes windows that overlap by one token."""
    eos = _find_eos(tokenizer)
    prefix, _ = find_special_tokens(tokenizer)
    size = sample_format.max_length
    for raw in _tokenize_batches(tokenizer, [value[0] for value in rows.values]):
        ids = prefix + _append_eos(strip_special_tokens(raw, prefix, []), eos)
        if len(ids) < 2 or size < 2:
            message = f"{len(ids)} token and max_length {size} leave nothing to predict"
            yield EncodedRow(len(ids), error=RowError(message, kind=LONG))
            continue
        windows = [ids[start : start + size] for start in range(0, len(ids) - 1, size - 1)]
        yield EncodedRow(len(ids), [(window, [IGNORE_INDEX, *window[1:]]) for window in windows], cut=len(windows) > 1)


def encode_seq2seq(rows: Rows, tokenizer: Tokenizer, sample_format: SampleFormat) -> Iterator[EncodedRow]:
    """Encode prompts for an encoder and completions for a decoder: a long prompt loses its end."""
    if rows.format != "completion":
        what = f"{rows.path} has rows of the format {rows.format}"
        raise DataError(f"{what}; an encoder and a decoder learn from prompt and completion")
    eos = _find_eos(tokenizer)
    prefix, suffix = find_special_tokens(tokenizer)
    before, after = find_special_tokens(tokenizer, side="text_target")
    if eos not in after:
        after = [eos, *after]
    budget = _compute_token_budget(sample_format, prefix, suffix)
    prompts = _tokenize_batches(tokenizer, [value[0] for value in rows.values])
    completions = _tokenize_batches(tokenizer, [value[1] for value in rows.values], side="text_target")
    for raw_prompt, raw_completion in zip(prompts, completions, strict=True):
        source = strip_special_tokens(raw_prompt, prefix, suffix)
        target = before + strip_special_tokens(raw_completion, before, after) + after
        length = max(len(prefix) + len(source) + len(suffix), len(target))
        if len(target) > sample_format.max_length:
            yield EncodedRow(length, error=_build_completion_error(target, sample_format))
            continue
        yield EncodedRow(length, [(prefix + source[:budget] + suffix, target)], cut=len(source) > budget)


def encode_labeled_texts(rows: Rows, tokenizer: Tokenizer, sample_format: SampleFormat) -> Iterator[EncodedRow]:
    """Encode texts with one label each: a long text loses its end."""
    label2id = sample_format.label2id
    prefix, suffix = find_special_tokens(tokenizer)
    budget = _compute_token_budget(sample_format, prefix, suffix)
    texts = _tokenize_batches(tokenizer, [value[0] for value in rows.values])
    for value, ids in zip(rows.values, texts, strict=True):
        label = str(value[1])
        length = len(prefix) + len(ids) + len(suffix)
        if label not in label2id:
            yield EncodedRow(length, error=RowError(_describe_unknown_label(label, label2id)))
            continue
        yield EncodedRow(length, [(prefix + ids[:budget] + suffix, [label2id[label]])], cut=len(ids) > budget)


def encode_labeled_words(rows: Rows, tokenizer: Tokenizer, sample_format: SampleFormat) -> Iterator[EncodedRow]:
    """Encode words with one label each, joined by single spaces, as in the running text that a model is used on."""
    if not tokenizer.is_fast:
        raise DataError("the tokenizer does not report the offsets of its tokens, so words would lose their labels")
    label2id = sample_format.label2id
    prefix, suffix = find_special_tokens(tokenizer)
    budget = _compute_token_budget(sample_format, prefix, suffix)
    for words, labels in rows.values:
        tokens = tokenizer(" ".join(words), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, first_tokens = tokens["input_ids"], _find_first_tokens(words, tokens["offset_mapping"])
        length = len(prefix) + len(ids) + len(suffix)
        reason = _reason_not_labelable(words, labels, first_tokens, label2id)
        if reason:
            yield EncodedRow(length, error=RowError(reason))
            continue
        token_labels = [IGNORE_INDEX] * len(ids)
        for number, token in first_tokens.items():
            token_labels[token] = label2id[str(labels[number - 1])]
        padded = [IGNORE_INDEX] * len(prefix) + token_labels[:budget] + [IGNORE_INDEX] * len(suffix)
        yield EncodedRow(length, [(prefix + ids[:budget] + suffix, padded)], cut=len(ids) > budget)


def _reason_not_labelable(
    words: Sequence[str], labels: Sequence[str | int], first_tokens: Mapping[int, int], label2id: Mapping[str, int]
) -> str | None:
    """Return which word has no token for its label, or which label is unknown; None if there is neither."""
    for number, word in enumerate(words, start=1):
        if number not in first_tokens:
            return f"word {number} ({word!r}) has no token of its own"
    unknown = next((str(label) for label in labels if str(label) not in label2id), None)
    return None if unknown is None else _describe_unknown_label(unknown, label2id)


def _find_first_tokens(words: Sequence[str], spans: Sequence[tuple[int, int]]) -> dict[int, int]:
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


def _compute_token_budget(sample_format: SampleFormat, prefix: Sequence[int], suffix: Sequence[int]) -> int:
    """Return how many tokens of a text fit beside the special tokens."""
    budget = sample_format.max_length - len(prefix) - len(suffix)
    if budget < 1:
        raise DataError(f"max_length {sample_format.max_length} leaves no token beside the special ones")
    return budget


def _build_completion_error(completion: Sequence[int], sample_format: SampleFormat) -> RowError:
    message = f"the completion has {len(completion)} tokens and max_length is {sample_format.max_length}"
    return RowError(message, kind=LONG)


def _describe_unknown_label(label: str, label2id: Mapping[str, int]) -> str:
    return f"label {label!r} is not one of {format_list(list(label2id))}, which are those of the training rows"


def _tokenize_batches(
    tokenizer: Tokenizer, texts: Sequence[str], *, side: Literal["text", "text_target"] = "text"
) -> Iterator[list[int]]:
    start = size = 0
    for end, text in enumerate([*texts, ""]):
        is_full = end - start == _TOKENIZER_BATCH or (end > start and size + len(text) > _TOKENIZER_CHARACTERS)
        if is_full or end == len(texts) > start:
            # verbose=False: rows that are too long are cut and reported here, not by the tokenizer.
            batch = {side: list(texts[start:end])}
            yield from tokenizer(**batch, add_special_tokens=False, verbose=False)["input_ids"]
            start, size = end, 0
        size += len(text)


def _find_eos(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token, so a model could not learn where to end")
    return tokenizer.eos_token_id


def _append_eos(ids: list[int], eos: int) -> list[int]:
    return ids if ids and ids[-1] == eos else [*ids, eos]
