"""The tokens of a sample, and the positions of its loss, for each format.

    completion   [BOS] prompt separator | completion EOS      loss on everything after the bar
    chat         as the chat template renders it              loss on every answer and the token that ends it
    text         [BOS] text EOS                               loss on all but the first token, which nothing predicts

Texts with labels are encoded in `lora_kit.data.label_encoders`.

Prompt and completion are tokenized separately and joined, so the boundary is the same in training and in generation.
The first token of a sample never carries the label of a token before it: labels other than `IGNORE_INDEX` are exactly
the tokens that are predicted. With `task="seq2seq"` the two stay apart:

    completion   prompt with special tokens → completion EOS  loss on everything after the arrow
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from lora_kit.data.batches import IGNORE_INDEX
from lora_kit.data.cells import RowError
from lora_kit.data.chat import ChatEncoder
from lora_kit.data.records import LONG
from lora_kit.data.rows import Rows
from lora_kit.data.sample_format import SampleFormat
from lora_kit.errors import DataError
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
        types: which of two texts each token of the one sample belongs to; None where the tokenizer does not say.
        weight: of the row in the loss.
    """

    length: int
    samples: Sequence[tuple[list[int], Sequence[float]]] = ()
    cut: bool = False
    divided: bool = False
    error: RowError | None = None
    types: list[int] | None = None
    weight: float = 1.0


RowEncoder = Callable[[Rows, Tokenizer, SampleFormat], Iterator[EncodedRow]]
"""Encodes the rows of one format, in order; raises DataError if none of them can be encoded."""


def encode_completions(rows: Rows, tokenizer: Tokenizer, sample_format: SampleFormat) -> Iterator[EncodedRow]:
    """Encode prompts with completions for a decoder: a long prompt loses its beginning, a completion nothing."""
    eos = _find_eos(tokenizer)
    prefix, _ = find_special_tokens(tokenizer)
    texts = [render_prompt(value[0], separator=sample_format.separator) for value in rows.values]
    prompts = tokenize_batches(tokenizer, texts)
    completions = tokenize_batches(tokenizer, [value[1] for value in rows.values])
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
    for raw in tokenize_batches(tokenizer, [value[0] for value in rows.values]):
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
    budget = compute_token_budget(sample_format.max_length, prefix, suffix)
    prompts = tokenize_batches(tokenizer, [value[0] for value in rows.values])
    completions = tokenize_batches(tokenizer, [value[1] for value in rows.values], side="text_target")
    for raw_prompt, raw_completion in zip(prompts, completions, strict=True):
        source = strip_special_tokens(raw_prompt, prefix, suffix)
        target = before + strip_special_tokens(raw_completion, before, after) + after
        length = max(len(prefix) + len(source) + len(suffix), len(target))
        if len(target) > sample_format.max_length:
            yield EncodedRow(length, error=_build_completion_error(target, sample_format))
            continue
        yield EncodedRow(length, [(prefix + source[:budget] + suffix, target)], cut=len(source) > budget)


def compute_token_budget(max_length: int, prefix: Sequence[int], suffix: Sequence[int]) -> int:
    """Return how many tokens of a text fit beside the special tokens.

    Raises:
        DataError: none does.
    """
    budget = max_length - len(prefix) - len(suffix)
    if budget < 1:
        raise DataError(f"max_length {max_length} leaves no token beside the special ones")
    return budget


def _build_completion_error(completion: Sequence[int], sample_format: SampleFormat) -> RowError:
    message = f"the completion has {len(completion)} tokens and max_length is {sample_format.max_length}"
    return RowError(message, kind=LONG)


def tokenize_batches(
    tokenizer: Tokenizer, texts: Sequence[str], *, side: Literal["text", "text_target"] = "text"
) -> Iterator[list[int]]:
    """Yield the tokens of each text without special tokens, many texts at a time."""
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
