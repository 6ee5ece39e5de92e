"""Rows as tokens and labels: which tokens a sample has, and on which of them the loss is taken.

    completion   [BOS] prompt separator | completion EOS      loss on what stands after the bar
    chat         as the chat template renders it              loss on every answer and the token that ends it
    text         [BOS] text EOS                               loss on all but the first token, which nothing predicts
    label        text with the tokenizer's own special tokens loss on the label

Prompt and completion are tokenised apart and joined, so the boundary is the same in training and in generation. The
first token of a sample never carries a label: labels other than `IGNORED` are exactly the tokens that are predicted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from lora_kit.data.chat import ChatEncoder, ChatTemplate
from lora_kit.data.formats import RowError
from lora_kit.data.rows import Rows, refusal
from lora_kit.data.sources import LONG, Fault
from lora_kit.errors import DataError, listed
from lora_kit.models import DEFAULT_SEPARATOR, render_prompt, special_tokens

logger = logging.getLogger(__name__)

IGNORED: Final = -100
"""The label of a position on which no loss is taken."""
LONGEST: Final = 2048
"""Tokens of a sample where nobody sets a lower limit."""
_BATCH: Final = 1024
"""Rows handed to the tokenizer at once."""
_CUT: Final[Mapping[str, str]] = {
    "completion": "prompts were cut on the left",
    "chat": "conversations were taken apart, or lost the beginning of a question,",
    "label": "texts were cut at the end",
    "text": "texts became several windows",
}
"""What is done to rows that are too long."""


@dataclass(frozen=True)
class Encoded(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Samples ready to be put into batches.

    Attributes:
        ids: the tokens of all samples, one after another: int32 (tokens,).
        offsets: where each sample begins, and the end: int64 (samples + 1,).
        labels: of each token, `IGNORED` where there is no loss: int32 (tokens,); or, if `kind` is `label`, of each
            sample: int32 (samples,).
        kind: `token` where tokens carry labels, `label` where the whole text has one.
    """

    ids: Tensor
    offsets: Tensor
    labels: Tensor
    kind: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids` int64 (length,), and `labels`: int64 (length,), or () for a label of the whole text."""
        place = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        labels = self.labels[index] if self.kind == "label" else self.labels[place]
        return {"input_ids": self.ids[place].long(), "labels": labels.long()}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sample: int64 (samples,)."""
        return self.offsets.diff()

    @property
    def num_labels(self) -> int:
        """Positions on which a loss is taken: predicted tokens, or texts."""
        return len(self) if self.kind == "label" else int((self.labels != IGNORED).sum())


@dataclass(frozen=True)
class Measured:
    """Rows as samples, with what had to be done to them.

    Attributes:
        encoded: the samples of the rows that have any.
        lengths: tokens of each row before anything was cut; 0 of a conversation that cannot be trained on.
        cut: lines of the rows that were cut or became several samples.
        faults: the rows that cannot be trained on.
    """

    encoded: Encoded
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
) -> Encoded:
    """Tokens and labels of the rows of a file.

    A prompt that is too long loses tokens on its left; a completion is never cut. A conversation is taken apart between
    exchanges, see `lora_kit.data.chat.ChatEncoder`. A text longer than `max_length` becomes several windows that
    overlap by one token, so that every token but the first is predicted exactly once. A text with a label loses tokens
    at its end. What was cut is logged.

    Args:
        max_length: tokens of a sample at the most.
        separator: joined to every prompt.
        template: of conversations.
        label2id: names of labels to numbers, for rows with labels.

    Raises:
        DataError: rows that cannot keep a label, or whose label is unknown; names their lines.
    """
    found = measure(rows, tokenizer, max_length=max_length, separator=separator, template=template, label2id=label2id)
    if found.faults:
        raise refusal(rows.path, found.faults, hint=_hint(found.faults))
    if found.cut:
        level = logging.INFO if rows.format == "text" else logging.WARNING
        told = "%s: %d of %d %s to fit %d tokens"
        logger.log(level, told, rows.path, len(found.cut), len(rows), _CUT[rows.format], max_length)
    return found.encoded


def measure(
    rows: Rows,
    tokenizer: Any,
    *,
    max_length: int,
    separator: str = DEFAULT_SEPARATOR,
    template: ChatTemplate | None = None,
    label2id: Mapping[str, int] | None = None,
) -> Measured:
    """As `encode`, but rows that cannot be trained on are told, not raised.

    Raises:
        DataError: the tokenizer or the template can do nothing with rows of this format.
    """
    if rows.format == "label":
        each = _labelled(rows, tokenizer, max_length, label2id or {})
    elif tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token, so a model could not learn where to end")
    elif rows.format == "text":
        each = _texts(rows, tokenizer, max_length)
    elif rows.format == "chat":
        each = _chats(rows, tokenizer, max_length, template)
    else:
        each = _completions(rows, tokenizer, max_length, separator)
    done = list(zip(rows.lines, each, strict=True))
    return Measured(
        encoded=_packed([sample for _, row in done for sample in row.samples], rows.format),
        lengths=tuple(row.length for _, row in done),
        cut=tuple(line for line, row in done if row.cut),
        faults=tuple(Fault(line, row.fault, row.kind) for line, row in done if row.fault),
    )


def _hint(faults: Sequence[Fault]) -> str:
    if any(fault.kind == LONG for fault in faults):
        return "raise data.max_length, shorten these rows, or take them out: lora-kit prepare --drop long"
    return ""


@dataclass(frozen=True)
class _Done:
    """What became of one row."""

    length: int
    samples: Sequence[tuple[list[int], list[int]]] = ()
    cut: bool = False
    fault: str = ""
    kind: str = LONG


def _completions(rows: Rows, tokenizer: Any, max_length: int, separator: str) -> Iterator[_Done]:
    prefix, _ = special_tokens(tokenizer)
    prompts = _tokens(tokenizer, [render_prompt(value[0], separator=separator) for value in rows.values])
    completions = _tokens(tokenizer, [value[1] for value in rows.values])
    for raw, written in zip(prompts, completions, strict=True):
        completion, prompt = _ended(written, tokenizer.eos_token_id), _without(raw, prefix)
        length = len(prefix) + len(prompt) + len(completion)
        room = max_length - len(prefix) - len(completion)
        # Something must stand before the first label, or nothing predicts it.
        if room < 0 or not (prefix or (prompt and room)):
            yield _Done(length, fault=f"the completion has {len(completion)} tokens and max_length is {max_length}")
            continue
        kept = prefix + prompt[max(0, len(prompt) - room) :]
        labels = [IGNORED] * len(kept) + completion
        yield _Done(length, [(kept + completion, labels)], cut=len(prompt) > room)


def _chats(rows: Rows, tokenizer: Any, max_length: int, template: ChatTemplate | None) -> Iterator[_Done]:
    if template is None:
        raise DataError(f"{rows.path} holds conversations, and no chat template was given")
    encoder = ChatEncoder(tokenizer, template, max_length=max_length)
    for (messages,) in rows.values:
        try:
            length, samples = encoder.samples(messages)
        except RowError as error:
            yield _Done(0, fault=str(error), kind=error.kind)
            continue
        labelled = [
            (ids, [token if loss else IGNORED for token, loss in zip(ids, learned, strict=True)])
            for ids, learned in samples
        ]
        yield _Done(length, labelled, cut=length > max_length)


def _texts(rows: Rows, tokenizer: Any, max_length: int) -> Iterator[_Done]:
    prefix, _ = special_tokens(tokenizer)
    for raw in _tokens(tokenizer, [value[0] for value in rows.values]):
        ids = prefix + _ended(_without(raw, prefix), tokenizer.eos_token_id)
        if len(ids) < 2 or max_length < 2:
            yield _Done(len(ids), fault=f"{len(ids)} token and max_length {max_length} leave nothing to predict")
            continue
        windows = [ids[start : start + max_length] for start in range(0, len(ids) - 1, max_length - 1)]
        yield _Done(len(ids), [(window, [IGNORED, *window[1:]]) for window in windows], cut=len(windows) > 1)


def _labelled(rows: Rows, tokenizer: Any, max_length: int, label2id: Mapping[str, int]) -> Iterator[_Done]:
    prefix, suffix = special_tokens(tokenizer)
    room = max_length - len(prefix) - len(suffix)
    if room < 1:
        raise DataError(f"max_length {max_length} has no room for a token beside the special ones")
    for value, ids in zip(rows.values, _tokens(tokenizer, [value[0] for value in rows.values]), strict=True):
        label = str(value[1])
        length = len(prefix) + len(ids) + len(suffix)
        if label not in label2id:
            known = f"label {label!r} is not one of {listed(list(label2id))}"
            yield _Done(length, fault=f"{known}, which are those of the training rows", kind="bad")
            continue
        yield _Done(length, [(prefix + ids[:room] + suffix, [label2id[label]])], cut=len(ids) > room)


def _tokens(tokenizer: Any, texts: Sequence[str]) -> Iterator[list[int]]:
    for start in range(0, len(texts), _BATCH):
        # verbose=False: what is too long is dealt with here, and said here.
        yield from tokenizer(list(texts[start : start + _BATCH]), add_special_tokens=False, verbose=False)["input_ids"]


def _without(ids: list[int], prefix: list[int]) -> list[int]:
    """The tokens without a BOS that the text itself begins with: one is put there anyway."""
    return ids[len(prefix) :] if prefix and ids[: len(prefix)] == prefix else ids


def _ended(ids: list[int], eos: int) -> list[int]:
    return ids if ids and ids[-1] == eos else [*ids, eos]


def _packed(samples: Sequence[tuple[Sequence[int], Sequence[int]]], format_: str) -> Encoded:
    ids = torch.tensor([token for sample, _ in samples for token in sample], dtype=torch.int32)
    lengths = torch.tensor([0, *(len(sample) for sample, _ in samples)])
    labels = torch.tensor([label for _, found in samples for label in found], dtype=torch.int32)
    return Encoded(ids=ids, offsets=lengths.cumsum(0), labels=labels, kind="label" if format_ == "label" else "token")
