"""Rows as tokens and labels: which tokens a sample has, and on which of them the loss is taken.

    completion   [BOS] prompt separator | completion EOS      loss on what stands after the bar
    chat         as the chat template renders it              loss on every answer and the token that ends it
    text         [BOS] text EOS                               loss on all but the first token, which nothing predicts
    label        text with the tokenizer's own special tokens loss on the label
    words        the words' text, in the same way             loss on the first token of each word, if it has a label

Prompt and completion are tokenised apart and joined, so the boundary is the same in training and in generation. The
first token of a sample never carries the label of a token before it: labels other than `IGNORED` are exactly the tokens
that are predicted. For an encoder and a decoder (`task="seq2seq"`) they stay apart:

    completion   prompt with special tokens → completion EOS  loss on all of what stands after the arrow
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from lora_kit.data.batches import IGNORE_INDEX, EncodedDataset, join_samples
from lora_kit.data.chat import ChatEncoder, ChatTemplate
from lora_kit.data.layouts import RowError
from lora_kit.data.readers import BAD, LONG, Fault
from lora_kit.data.rows import Rows, build_fault_error
from lora_kit.errors import DataError, format_list
from lora_kit.models.prompt_tokens import DEFAULT_SEPARATOR, find_special_tokens, render_prompt, strip_special_tokens
from lora_kit.models.tasks import CAUSAL_LM, LABEL, NEXT, SEQ2SEQ, TARGET, WORD

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH: Final = 2048
"""Tokens of a sample where nobody sets a lower limit."""
_TOKENIZER_BATCH: Final = 1024
"""Rows handed to the tokenizer at once."""
_CUT_MESSAGES: Final[Mapping[str, str]] = {
    "completion": "prompts were cut on the left",
    "chat": "conversations were taken apart, or lost the beginning of a question,",
    "label": "texts were cut at the end",
    "text": "texts became several windows",
    "words": "texts were cut at the end, and the labels there are not learned,",
}
"""What is done to rows that are too long."""
_CUT_SOURCE_MESSAGE: Final = "prompts were cut at the end"


@dataclass(frozen=True)
class EncodingResult:
    """Rows as samples, with what had to be done to them.

    Attributes:
        encoded: the samples of the rows that have any.
        lengths: tokens of each row before anything was cut; 0 of a conversation that cannot be trained on.
        cut: lines of the rows that were cut or became several samples.
        faults: the rows that cannot be trained on.
    """

    encoded: EncodedDataset
    lengths: tuple[int, ...]
    cut: tuple[int, ...]
    faults: tuple[Fault, ...]


def encode(
    rows: Rows,
    tokenizer: Any,
    *,
    max_length: int,
    separator: str = DEFAULT_SEPARATOR,
    template: ChatTemplate | None = None,
    label2id: Mapping[str, int] | None = None,
    task: str = CAUSAL_LM,
) -> EncodedDataset:
    """Tokens and labels of the rows of a file.

    A prompt that is too long loses tokens on its left; a completion is never cut. A conversation is taken apart between
    exchanges, see `lora_kit.data.chat.ChatEncoder`. A text longer than `max_length` becomes several windows that
    overlap by one token, so that every token but the first is predicted exactly once. A text with a label, or
    with labels of its words, loses tokens at its end, and so does a prompt that an encoder reads. What was cut is
    logged.

    Args:
        max_length: tokens of a sample at the most.
        separator: joined to every prompt, but to none that an encoder reads.
        template: of conversations.
        label2id: names of labels to numbers, for rows with labels.
        task: `seq2seq` where an encoder reads prompts and a decoder writes completions.

    Raises:
        DataError: rows that cannot keep a label, or whose label is unknown; names their lines.
    """
    found = encode_with_faults(
        rows,
        tokenizer,
        max_length=max_length,
        separator=separator,
        template=template,
        label2id=label2id,
        task=task,
    )
    if found.faults:
        raise build_fault_error(rows.path, found.faults, hint=_suggest_fix(found.faults))
    if found.cut:
        level = logging.INFO if rows.format == "text" else logging.WARNING
        done = _CUT_SOURCE_MESSAGE if found.encoded.kind == TARGET else _CUT_MESSAGES[rows.format]
        logger.log(level, "%s: %d of %d %s to fit %d tokens", rows.path, len(found.cut), len(rows), done, max_length)
    return found.encoded


def encode_with_faults(
    rows: Rows,
    tokenizer: Any,
    *,
    max_length: int,
    separator: str = DEFAULT_SEPARATOR,
    template: ChatTemplate | None = None,
    label2id: Mapping[str, int] | None = None,
    task: str = CAUSAL_LM,
) -> EncodingResult:
    """As `encode`, but rows that cannot be trained on are told, not raised.

    Raises:
        DataError: the tokenizer or the template can do nothing with rows of this format.
    """
    kind = {"label": LABEL, "words": WORD}.get(rows.format, NEXT)
    if kind == LABEL:
        each = _encode_labeled_texts(rows, tokenizer, max_length, label2id or {})
    elif kind == WORD:
        each = _encode_words(rows, tokenizer, max_length, label2id or {})
    elif tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token, so a model could not learn where to end")
    elif task == SEQ2SEQ:
        kind, each = TARGET, _encode_seq2seq(rows, tokenizer, max_length)
    elif rows.format == "text":
        each = _encode_texts(rows, tokenizer, max_length)
    elif rows.format == "chat":
        each = _encode_chats(rows, tokenizer, max_length, template)
    else:
        each = _encode_completions(rows, tokenizer, max_length, separator)
    done = list(zip(rows.lines, each, strict=True))
    return EncodingResult(
        encoded=join_samples([sample for _, row in done for sample in row.samples], kind=kind),
        lengths=tuple(row.length for _, row in done),
        cut=tuple(line for line, row in done if row.cut),
        faults=tuple(Fault(line, row.fault, row.kind) for line, row in done if row.fault),
    )


def _suggest_fix(faults: Sequence[Fault]) -> str:
    if any(fault.kind == LONG for fault in faults):
        return "raise data.max_length, shorten these rows, or take them out: lora-kit prepare --drop long"
    return ""


@dataclass(frozen=True)
class _EncodedRow:
    """What became of one row."""

    length: int
    samples: Sequence[tuple[list[int], list[int]]] = ()
    cut: bool = False
    fault: str = ""
    kind: str = LONG


def _encode_completions(rows: Rows, tokenizer: Any, max_length: int, separator: str) -> Iterator[_EncodedRow]:
    prefix, _ = find_special_tokens(tokenizer)
    prompts = _tokenize_batches(tokenizer, [render_prompt(value[0], separator=separator) for value in rows.values])
    completions = _tokenize_batches(tokenizer, [value[1] for value in rows.values])
    for raw, written in zip(prompts, completions, strict=True):
        completion, prompt = _append_eos(written, tokenizer.eos_token_id), strip_special_tokens(raw, prefix, [])
        length = len(prefix) + len(prompt) + len(completion)
        room = max_length - len(prefix) - len(completion)
        # Something must stand before the first label, or nothing predicts it.
        if room < 0 or not (prefix or (prompt and room)):
            yield _EncodedRow(
                length, fault=f"the completion has {len(completion)} tokens and max_length is {max_length}"
            )
            continue
        kept = prefix + prompt[max(0, len(prompt) - room) :]
        labels = [IGNORE_INDEX] * len(kept) + completion
        yield _EncodedRow(length, [(kept + completion, labels)], cut=len(prompt) > room)


def _encode_chats(rows: Rows, tokenizer: Any, max_length: int, template: ChatTemplate | None) -> Iterator[_EncodedRow]:
    if template is None:
        raise DataError(f"{rows.path} holds conversations, and no chat template was given")
    encoder = ChatEncoder(tokenizer, template, max_length=max_length)
    for (messages,) in rows.values:
        try:
            length, samples = encoder.samples(messages)
        except RowError as error:
            yield _EncodedRow(0, fault=str(error), kind=error.kind)
            continue
        labelled = [
            (ids, [token if loss else IGNORE_INDEX for token, loss in zip(ids, learned, strict=True)])
            for ids, learned in samples
        ]
        yield _EncodedRow(length, labelled, cut=length > max_length)


def _encode_texts(rows: Rows, tokenizer: Any, max_length: int) -> Iterator[_EncodedRow]:
    prefix, _ = find_special_tokens(tokenizer)
    for raw in _tokenize_batches(tokenizer, [value[0] for value in rows.values]):
        ids = prefix + _append_eos(strip_special_tokens(raw, prefix, []), tokenizer.eos_token_id)
        if len(ids) < 2 or max_length < 2:
            yield _EncodedRow(len(ids), fault=f"{len(ids)} token and max_length {max_length} leave nothing to predict")
            continue
        windows = [ids[start : start + max_length] for start in range(0, len(ids) - 1, max_length - 1)]
        yield _EncodedRow(len(ids), [(window, [IGNORE_INDEX, *window[1:]]) for window in windows], cut=len(windows) > 1)


def _encode_seq2seq(rows: Rows, tokenizer: Any, max_length: int) -> Iterator[_EncodedRow]:
    if rows.format != "completion":
        what = f"{rows.path} has rows of the format {rows.format}"
        raise DataError(f"{what}; an encoder and a decoder learn from prompt and completion")
    prefix, suffix = find_special_tokens(tokenizer)
    before, after = find_special_tokens(tokenizer, side="text_target")
    if tokenizer.eos_token_id not in after:
        after = [tokenizer.eos_token_id, *after]
    room = _compute_token_budget(max_length, prefix, suffix)
    prompts = _tokenize_batches(tokenizer, [value[0] for value in rows.values])
    completions = _tokenize_batches(tokenizer, [value[1] for value in rows.values], side="text_target")
    for raw, written in zip(prompts, completions, strict=True):
        source = strip_special_tokens(raw, prefix, suffix)
        target = before + strip_special_tokens(written, before, after) + after
        length = max(len(prefix) + len(source) + len(suffix), len(target))
        if len(target) > max_length:
            yield _EncodedRow(length, fault=f"the completion has {len(target)} tokens and max_length is {max_length}")
            continue
        yield _EncodedRow(length, [(prefix + source[:room] + suffix, target)], cut=len(source) > room)


def _encode_labeled_texts(
    rows: Rows, tokenizer: Any, max_length: int, label2id: Mapping[str, int]
) -> Iterator[_EncodedRow]:
    prefix, suffix = find_special_tokens(tokenizer)
    room = _compute_token_budget(max_length, prefix, suffix)
    for value, ids in zip(rows.values, _tokenize_batches(tokenizer, [value[0] for value in rows.values]), strict=True):
        label = str(value[1])
        length = len(prefix) + len(ids) + len(suffix)
        if label not in label2id:
            yield _EncodedRow(length, fault=_describe_unknown_label(label, label2id), kind=BAD)
            continue
        yield _EncodedRow(length, [(prefix + ids[:room] + suffix, [label2id[label]])], cut=len(ids) > room)


def _encode_words(rows: Rows, tokenizer: Any, max_length: int, label2id: Mapping[str, int]) -> Iterator[_EncodedRow]:
    """Words as they stand in running text, one space between them: what a model is given when it is used."""
    if not tokenizer.is_fast:
        raise DataError("the tokenizer does not say where in a text its tokens stand, so words would lose their labels")
    prefix, suffix = find_special_tokens(tokenizer)
    room = _compute_token_budget(max_length, prefix, suffix)
    for words, labels in rows.values:
        found = tokenizer(" ".join(words), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, firsts = found["input_ids"], _find_first_tokens(words, found["offset_mapping"])
        length = len(prefix) + len(ids) + len(suffix)
        faults = [f"word {n} ({word!r}) has no token of its own" for n, word in enumerate(words, 1) if n not in firsts]
        faults += [_describe_unknown_label(str(label), label2id) for label in labels if str(label) not in label2id]
        if faults:
            yield _EncodedRow(length, fault=faults[0], kind=BAD)
            continue
        marked = [IGNORE_INDEX] * len(ids)
        for number, token in firsts.items():
            marked[token] = label2id[str(labels[number - 1])]
        learned = [IGNORE_INDEX] * len(prefix) + marked[:room] + [IGNORE_INDEX] * len(suffix)
        yield _EncodedRow(length, [(prefix + ids[:room] + suffix, learned)], cut=len(ids) > room)


def _find_first_tokens(words: Sequence[str], spans: Sequence[tuple[int, int]]) -> dict[int, int]:
    """The number of a word, from 1 → its first token; words without one of their own are left out.

    Args:
        spans: where in the words' text the tokens stand; a token may take in the space before its word.
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


def _compute_token_budget(max_length: int, prefix: Sequence[int], suffix: Sequence[int]) -> int:
    """Tokens that there is room for beside the special ones."""
    room = max_length - len(prefix) - len(suffix)
    if room < 1:
        raise DataError(f"max_length {max_length} has no room for a token beside the special ones")
    return room


def _describe_unknown_label(label: str, label2id: Mapping[str, int]) -> str:
    return f"label {label!r} is not one of {format_list(list(label2id))}, which are those of the training rows"


def _tokenize_batches(
    tokenizer: Any, texts: Sequence[str], *, side: Literal["text", "text_target"] = "text"
) -> Iterator[list[int]]:
    for start in range(0, len(texts), _TOKENIZER_BATCH):
        # verbose=False: what is too long is dealt with here, and said here.
        some = {side: list(texts[start : start + _TOKENIZER_BATCH])}
        yield from tokenizer(**some, add_special_tokens=False, verbose=False)["input_ids"]


def _append_eos(ids: list[int], eos: int) -> list[int]:
    return ids if ids and ids[-1] == eos else [*ids, eos]
