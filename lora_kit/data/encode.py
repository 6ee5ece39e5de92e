"""Rows as tokens and labels: which tokens a sample has, and on which of them the loss is taken.

    completion   [BOS] prompt separator | completion EOS      loss on what stands after the bar
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

from lora_kit.data.rows import Rows
from lora_kit.errors import DataError, listed
from lora_kit.models import DEFAULT_SEPARATOR, render_prompt, special_tokens

logger = logging.getLogger(__name__)

IGNORED: Final = -100
"""The label of a position on which no loss is taken."""
_BATCH: Final = 1024
"""Rows handed to the tokenizer at once."""


@dataclass(frozen=True)
class Encoded(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Samples ready to be put into batches.

    Attributes:
        ids: the tokens of all samples, one after another: int32 (tokens,).
        offsets: where each sample begins, and the end: int64 (samples + 1,).
        targets: for each sample the place in it of its first label, or the label itself if `kind` is `label`: int64
            (samples,).
        kind: `token` where tokens carry labels, `label` where the whole text has one.
    """

    ids: Tensor
    offsets: Tensor
    targets: Tensor
    kind: str

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids` int64 (length,), and `labels`: int64 (length,), or () for a label of the whole text."""
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        ids = self.ids[start:end].long()
        if self.kind == "label":
            return {"input_ids": ids, "labels": self.targets[index]}
        labels = ids.clone()
        labels[: int(self.targets[index])] = IGNORED
        return {"input_ids": ids, "labels": labels}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sample: int64 (samples,)."""
        return self.offsets.diff()

    @property
    def num_labels(self) -> int:
        """Positions on which a loss is taken: predicted tokens, or texts."""
        return len(self) if self.kind == "label" else int((self.lengths - self.targets).sum())


def encode(
    rows: Rows,
    tokenizer: Any,
    *,
    max_length: int,
    separator: str = DEFAULT_SEPARATOR,
    label2id: Mapping[str, int] | None = None,
) -> Encoded:
    """Tokens and labels of the rows of a file.

    A prompt that is too long loses tokens on its left; a completion is never cut. A text longer than `max_length`
    becomes several windows that overlap by one token, so that every token but the first is predicted exactly once. A
    text with a label loses tokens at its end. What was cut is logged.

    Args:
        max_length: tokens of a sample at the most.
        separator: joined to every prompt.
        label2id: names of labels to numbers, for rows with labels.

    Raises:
        DataError: rows that cannot keep a label, or whose label is unknown; names their lines.
    """
    if rows.format == "label":
        return _with_labels(rows, tokenizer, max_length, label2id or {})
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token, so a model could not learn where to end")
    if rows.format == "text":
        return _texts(rows, tokenizer, max_length)
    return _completions(rows, tokenizer, max_length, separator)


def _completions(rows: Rows, tokenizer: Any, max_length: int, separator: str) -> Encoded:
    prefix, _ = special_tokens(tokenizer)
    prompts = _tokens(tokenizer, [render_prompt(value[0], separator=separator) for value in rows.values])
    completions = _tokens(tokenizer, [value[1] for value in rows.values])
    samples, starts, faults, cut = [], [], [], 0
    for line, raw, written in zip(rows.lines, prompts, completions, strict=True):
        completion, prompt = _ended(written, tokenizer.eos_token_id), _without(raw, prefix)
        room = max_length - len(prefix) - len(completion)
        # Something must stand before the first label, or nothing predicts it.
        if room < 0 or not (prefix or (prompt and room)):
            fault = f"the completion has {len(completion)} tokens and max_length is {max_length}"
            faults.append(f"{rows.path}:{line}: {fault}")
            continue
        cut += len(prompt) > room
        kept = prefix + prompt[max(0, len(prompt) - room) :]
        samples.append(kept + completion)
        starts.append(len(kept))
    _refuse(faults, "raise data.max_length, or shorten the completions")
    if cut:
        told = "%s: %d of %d prompts were cut on the left to fit %d tokens"
        logger.warning(told, rows.path, cut, len(rows), max_length)
    return _packed(samples, starts, "token")


def _texts(rows: Rows, tokenizer: Any, max_length: int) -> Encoded:
    prefix, _ = special_tokens(tokenizer)
    samples, faults, cut = [], [], 0
    for line, raw in zip(rows.lines, _tokens(tokenizer, [value[0] for value in rows.values]), strict=True):
        ids = prefix + _ended(_without(raw, prefix), tokenizer.eos_token_id)
        if len(ids) < 2 or max_length < 2:
            faults.append(f"{rows.path}:{line}: {len(ids)} token and max_length {max_length} leave nothing to predict")
            continue
        windows = [ids[start : start + max_length] for start in range(0, len(ids) - 1, max_length - 1)]
        cut += len(windows) > 1
        samples += windows
    _refuse(faults, "raise data.max_length, or take these rows out")
    if cut:
        logger.info("%s: %d of %d texts became several windows of %d tokens", rows.path, cut, len(rows), max_length)
    return _packed(samples, [1] * len(samples), "token")


def _with_labels(rows: Rows, tokenizer: Any, max_length: int, label2id: Mapping[str, int]) -> Encoded:
    unknown = [
        f"{rows.path}:{line}: label {str(value[1])!r} is not one of {listed(list(label2id))}"
        for line, value in zip(rows.lines, rows.values, strict=True)
        if str(value[1]) not in label2id
    ]
    _refuse(unknown, "the labels are those of the training file")
    prefix, suffix = special_tokens(tokenizer)
    room = max_length - len(prefix) - len(suffix)
    if room < 1:
        raise DataError(f"max_length {max_length} has no room for a token beside the special ones")
    samples, cut = [], 0
    for ids in _tokens(tokenizer, [value[0] for value in rows.values]):
        cut += len(ids) > room
        samples.append(prefix + ids[:room] + suffix)
    if cut:
        logger.warning("%s: %d of %d texts were cut at the end to fit %d tokens", rows.path, cut, len(rows), max_length)
    return _packed(samples, [label2id[str(value[1])] for value in rows.values], "label")


def _tokens(tokenizer: Any, texts: Sequence[str]) -> Iterator[list[int]]:
    for start in range(0, len(texts), _BATCH):
        # verbose=False: what is too long is dealt with here, and said here.
        yield from tokenizer(list(texts[start : start + _BATCH]), add_special_tokens=False, verbose=False)["input_ids"]


def _without(ids: list[int], prefix: list[int]) -> list[int]:
    """The tokens without a BOS that the text itself begins with: one is put there anyway."""
    return ids[len(prefix) :] if prefix and ids[: len(prefix)] == prefix else ids


def _ended(ids: list[int], eos: int) -> list[int]:
    return ids if ids and ids[-1] == eos else [*ids, eos]


def _refuse(faults: Sequence[str], hint: str) -> None:
    if faults:
        more = f"\nand {len(faults) - 8} more lines" if len(faults) > 8 else ""
        raise DataError("\n".join(faults[:8]) + more, hint=hint)


def _packed(samples: Sequence[Sequence[int]], targets: Sequence[int], kind: str) -> Encoded:
    ids = torch.tensor([token for sample in samples for token in sample], dtype=torch.int32)
    lengths = torch.tensor([0, *map(len, samples)])
    return Encoded(ids=ids, offsets=lengths.cumsum(0), targets=torch.tensor(targets, dtype=torch.int64), kind=kind)
