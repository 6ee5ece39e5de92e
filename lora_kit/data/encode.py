"""Rows as tokens and labels; `lora_kit.data.row_encoders` says which tokens a sample has, and where its loss is."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lora_kit.data.batches import EncodedDataset, concatenate_samples, join_samples
from lora_kit.data.label_encoders import encode_labeled_texts, encode_labeled_words
from lora_kit.data.preference_samples import encode_feedback, encode_pairs
from lora_kit.data.preferences import FEEDBACK_FORMATS, PAIR_FORMATS, get_answer_format
from lora_kit.data.prompt_rows import PROMPT_FORMATS
from lora_kit.data.prompt_samples import encode_prompts
from lora_kit.data.records import LONG, Fault
from lora_kit.data.row_encoders import (
    EncodedRow,
    RowEncoder,
    encode_completions,
    encode_conversations,
    encode_plain_texts,
    encode_seq2seq,
)
from lora_kit.data.rows import Rows, build_fault_error
from lora_kit.data.sample_format import SampleFormat
from lora_kit.data.templates import ChatTemplate
from lora_kit.models.prompt_tokens import DEFAULT_SEPARATOR
from lora_kit.models.protocols import Tokenizer
from lora_kit.models.tasks import CAUSAL_LM, LABEL, NEXT, PROBLEM_KINDS, SEQ2SEQ, SINGLE_LABEL, TARGET, WORD

logger = logging.getLogger(__name__)

_ENCODERS: Final[Mapping[str, tuple[str, RowEncoder]]] = {
    "completion": (NEXT, encode_completions),
    "chat": (NEXT, encode_conversations),
    "text": (NEXT, encode_plain_texts),
    "label": (LABEL, encode_labeled_texts),
    "words": (WORD, encode_labeled_words),
    **dict.fromkeys(PAIR_FORMATS, (NEXT, encode_pairs)),
    **dict.fromkeys(FEEDBACK_FORMATS, (NEXT, encode_feedback)),
    **dict.fromkeys(PROMPT_FORMATS, (NEXT, encode_prompts)),
}
"""The kind of the samples, and what encodes the rows, by format."""
_CUT_MESSAGES: Final[Mapping[str, str]] = {
    "completion": "prompts were cut on the left",
    "chat": "conversations were split, or a question lost its beginning,",
    "label": "texts were cut at the end",
    "text": "texts became several windows",
    "words": "texts were cut at the end, and the labels there are not learned,",
}
"""What happens to rows that are too long, by format."""
DIVIDED_MESSAGE: Final = "conversations have a sample for each answer that is rendered differently later on"
"""What happens to conversations in which an answer is not what it was once the conversation goes on."""
_CUT_SOURCE_MESSAGE: Final = "prompts were cut at the end"
"""What happens to prompts that are too long for an encoder."""


@dataclass(frozen=True)
class EncodingResult:
    """Rows as samples, and what had to be done to them.

    Attributes:
        encoded: the samples of all valid rows.
        lengths: tokens of each row before anything was cut; 0 for a conversation that cannot be trained on.
        cut: lines of the rows that were cut or became several samples to fit.
        divided: lines of the conversations in which answers have samples of their own; see `lora_kit.data.chat`.
        faults: the rows that cannot be trained on.
    """

    encoded: EncodedDataset
    lengths: tuple[int, ...]
    cut: tuple[int, ...]
    divided: tuple[int, ...]
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class RowCounts:
    """Rows, and how many of them had to be changed.

    Attributes:
        rows: how many there are.
        cut: how many were cut or became several samples to fit.
        divided: conversations in which answers have samples of their own.
    """

    rows: int = 0
    cut: int = 0
    divided: int = 0

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(self.rows + other.rows, self.cut + other.cut, self.divided + other.divided)


def encode(
    rows: Rows,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    separator: str = DEFAULT_SEPARATOR,
    template: ChatTemplate | None = None,
    label2id: Mapping[str, int] | None = None,
    task: str = CAUSAL_LM,
    problem: str = SINGLE_LABEL,
) -> EncodedDataset:
    """Return the tokens and labels of the rows of a file.

    A prompt that is too long loses tokens on its left; a completion is never cut. A conversation is split between
    exchanges, see `lora_kit.data.chat.ChatEncoder`. A text longer than `max_length` becomes several windows that
    overlap by one token, so that every token but the first is predicted exactly once. A text with a label, or with
    labels of its words, loses tokens at its end, and so does a prompt that an encoder reads. What was cut is logged.

    Args:
        max_length: most tokens of a sample.
        separator: text after every prompt, except one that an encoder reads.
        template: chat template of conversations.
        label2id: class of each label by its name, for rows with labels.
        task: `seq2seq` if an encoder reads prompts and a decoder writes completions.
        problem: what is predicted of a text with labels, one of `lora_kit.models.tasks.PROBLEMS`.

    Raises:
        DataError: rows that cannot keep a label, or whose label is unknown; the message lists their lines.
    """
    sample_format = SampleFormat(
        max_length=max_length,
        separator=separator,
        template=template,
        label2id=label2id or {},
        task=task,
        problem=problem,
    )
    return encode_rows(rows, tokenizer, sample_format)


def encode_rows(rows: Rows, tokenizer: Tokenizer, sample_format: SampleFormat) -> EncodedDataset:
    """Return the samples of rows in a format; see `encode`, which documents the limits and raises the same errors."""
    return encode_and_count(rows, tokenizer, sample_format)[0]


def encode_and_count(rows: Rows, tokenizer: Tokenizer, sample_format: SampleFormat) -> tuple[EncodedDataset, RowCounts]:
    """Return what `encode_rows` returns, and the counts of the rows, which are logged."""
    if rows.parts:
        parts = [encode_and_count(part, tokenizer, sample_format) for part in rows.parts]
        return concatenate_samples([samples for samples, _ in parts]), sum((each for _, each in parts), RowCounts())
    samples, counts = encode_chunk(rows, tokenizer, sample_format)
    log_counts(rows, counts, samples.kind, sample_format)
    return samples, counts


def encode_chunk(rows: Rows, tokenizer: Tokenizer, sample_format: SampleFormat) -> tuple[EncodedDataset, RowCounts]:
    """Return the samples of some rows of a file and the counts of the rows, without logging them.

    Raises:
        DataError: as `encode`.
    """
    result = encode_with_faults(rows, tokenizer, sample_format)
    if result.faults:
        faults = list(dict.fromkeys(result.faults))  # a row of a mixture may be there several times
        raise build_fault_error(rows.path, faults, hint=_suggest_fix(faults))
    return result.encoded, RowCounts(len(rows), len(result.cut), len(result.divided))


def log_counts(rows: Rows, counts: RowCounts, kind: str, sample_format: SampleFormat) -> None:
    """Log how many rows of a file were cut or divided.

    Args:
        rows: of the file; some of them are enough.
        kind: of the samples.
    """
    if counts.cut:
        level = logging.INFO if rows.format == "text" else logging.WARNING
        action = _CUT_SOURCE_MESSAGE if kind == TARGET else _CUT_MESSAGES[get_answer_format(rows.format)]
        limit = sample_format.max_length
        logger.log(level, "%s: %d of %d %s to fit %d tokens", rows.path, counts.cut, counts.rows, action, limit)
    if counts.divided:
        logger.info("%s: %d of %d %s", rows.path, counts.divided, counts.rows, DIVIDED_MESSAGE)


def encode_with_faults(rows: Rows, tokenizer: Tokenizer, sample_format: SampleFormat) -> EncodingResult:
    """Return the samples of rows in a format, and the rows that cannot be trained on as faults instead of an error.

    Raises:
        DataError: the tokenizer or the template cannot encode any row of this format.
    """
    # A file of which no row is valid has no format.
    kind, encode_each = _ENCODERS.get(rows.format, _ENCODERS["completion"])
    if kind == NEXT and sample_format.task == SEQ2SEQ:
        kind, encode_each = TARGET, encode_seq2seq
    if kind == LABEL:
        kind = PROBLEM_KINDS[sample_format.problem]
    encoded = list(zip(rows.lines, encode_each(rows, tokenizer, sample_format), strict=True))
    return EncodingResult(
        encoded=_join_rows([row for _, row in encoded], kind=kind),
        lengths=tuple(row.length for _, row in encoded),
        cut=tuple(line for line, row in encoded if row.cut),
        divided=tuple(line for line, row in encoded if row.divided),
        faults=tuple(Fault(line, str(row.error), row.error.kind) for line, row in encoded if row.error),
    )


def _join_rows(rows: Sequence[EncodedRow], *, kind: str) -> EncodedDataset:
    """Return the samples of rows as one data set, with types of tokens and weights where there are any."""
    samples = [(row, sample) for row in rows for sample in row.samples]
    has_types = any(row.types is not None for row, _ in samples)
    has_weights = any(row.weight != 1.0 for row, _ in samples)
    return join_samples(
        [sample for _, sample in samples],
        kind=kind,
        types=[row.types or [0] * len(ids) for row, (ids, _) in samples] if has_types else None,
        weights=[row.weight for row, _ in samples] if has_weights else None,
    )


def _suggest_fix(faults: Sequence[Fault]) -> str:
    if any(fault.kind == LONG for fault in faults):
        return "raise data.max_length, shorten these rows, or take them out: lora-kit prepare --drop long"
    return ""
