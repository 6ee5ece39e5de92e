"""Preferences as samples: each answer behind the prompt as `generate` is given it, and TRL's columns of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from lora_kit.data.batches import IGNORE_INDEX, EncodedDataset
from lora_kit.data.cells import RowError
from lora_kit.data.preferences import FEEDBACK_FORMATS, PAIR_FORMATS, get_answer_format
from lora_kit.data.row_encoders import EncodedRow, encode_completions, encode_conversations
from lora_kit.data.rows import Rows
from lora_kit.data.sample_format import SampleFormat
from lora_kit.models.protocols import Tokenizer

PREFERENCE: Final = "preference"
"""The kind of these samples."""


def encode_pairs(rows: Rows, tokenizer: Tokenizer, sample_format: SampleFormat) -> Iterator[EncodedRow]:
    """Encode each row as two samples, the chosen answer and the rejected one, behind the same tokens of the prompt."""
    chosen, rejected = (
        _encode_answers(rows, [value[side] for value in rows.values], tokenizer, sample_format) for side in (0, 1)
    )
    for first, second in zip(chosen, rejected, strict=True):
        yield _join_pair(first, second)


def encode_feedback(rows: Rows, tokenizer: Tokenizer, sample_format: SampleFormat) -> Iterator[EncodedRow]:
    """Encode each row as one sample."""
    for row in _encode_answers(rows, [value[0] for value in rows.values], tokenizer, sample_format):
        yield row if row.error or len(row.samples) == 1 else _build_split_error(row)


def _encode_answers(
    rows: Rows, answers: Sequence[Any], tokenizer: Tokenizer, sample_format: SampleFormat
) -> Iterator[EncodedRow]:
    inner = dataclasses.replace(rows, format=get_answer_format(rows.format), values=tuple(answers))
    encode = encode_conversations if inner.format == "chat" else encode_completions
    return encode(inner, tokenizer, sample_format)


def _join_pair(chosen: EncodedRow, rejected: EncodedRow) -> EncodedRow:
    length = max(chosen.length, rejected.length)
    for name, row in (("chosen", chosen), ("rejected", rejected)):
        if row.error:
            return EncodedRow(length, error=RowError(f"{name}: {row.error}", kind=row.error.kind))
        if len(row.samples) != 1:
            return _build_split_error(row)
    (prompt, answer), (other_prompt, other_answer) = (split_answer(*row.samples[0]) for row in (chosen, rejected))
    is_cut = chosen.cut or rejected.cut
    if prompt != other_prompt and not is_cut:
        return EncodedRow(length, error=RowError("the chat template renders the prompt differently for the answers"))
    # The longer answer left less of the prompt; both follow what it left.
    prompt = min(prompt, other_prompt, key=len)
    return EncodedRow(length, [_join_sample(prompt, each) for each in (answer, other_answer)], cut=is_cut)


def _build_split_error(row: EncodedRow) -> EncodedRow:
    return EncodedRow(row.length, error=RowError("the template gives several samples for one answer"))


def split_answer(ids: Sequence[int], labels: Sequence[float]) -> tuple[list[int], list[int]]:
    """Return the tokens of a sample before its first label, and those from there on."""
    first = next(index for index, label in enumerate(labels) if label != IGNORE_INDEX)
    return list(ids[:first]), list(ids[first:])


def _join_sample(prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
    return [*prompt, *answer], [IGNORE_INDEX] * len(prompt) + answer


@dataclass(frozen=True)
class PreferenceDataset(torch.utils.data.Dataset[dict[str, object]]):
    """Answers with a verdict; an item has the columns that TRL's trainers read.

    A preference pair is `prompt_ids`, `chosen_ids`, `rejected_ids`; a single answer is `prompt_ids`, `completion_ids`,
    `label`.

    Attributes:
        samples: of preference pairs: the chosen and the rejected answer in turn; else one for each row.
        verdicts: whether each answer is good; None for preference pairs.
    """

    samples: EncodedDataset
    verdicts: tuple[bool, ...] | None = None

    @property
    def kind(self) -> str:
        return PREFERENCE

    def __len__(self) -> int:
        return len(self.samples) // 2 if self.verdicts is None else len(self.samples)

    def __getitem__(self, index: int) -> dict[str, object]:
        if self.verdicts is None:
            (prompt, chosen), (_, rejected) = self._split(2 * index), self._split(2 * index + 1)
            return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        prompt, completion = self._split(index)
        return {"prompt_ids": prompt, "completion_ids": completion, "label": self.verdicts[index]}

    def _split(self, index: int) -> tuple[list[int], list[int]]:
        sample = self.samples[index]
        return split_answer(sample["input_ids"].tolist(), sample["labels"].tolist())

    @property
    def lengths(self) -> Tensor:
        """Tokens of each item, with those of both answers of a preference pair: int64 (items,)."""
        return self.samples.lengths if self.verdicts is not None else self.samples.lengths.reshape(-1, 2).sum(dim=1)

    @property
    def num_tokens(self) -> int:
        return self.samples.num_tokens

    @property
    def num_labels(self) -> int:
        """Tokens of the answers."""
        return self.samples.num_labels


def build_preference_dataset(rows: Rows, samples: EncodedDataset, *, unpaired: bool) -> PreferenceDataset:
    """Return the samples of rows of preferences as a data set.

    Args:
        samples: of all rows, in order.
        unpaired: whether preference pairs become single answers: a good one and a bad one. They come in turn, of
            different rows, so that neighbors share no prompt: chosen 0, rejected 1, …, then rejected 0, chosen 1, ….
    """
    if rows.format in FEEDBACK_FORMATS:
        return PreferenceDataset(samples, tuple(verdict for _, verdict in rows.values))
    assert rows.format in PAIR_FORMATS
    if not unpaired:
        return PreferenceDataset(samples)
    sides = [(row, (row + turn) % 2) for turn in (0, 1) for row in range(len(rows))]
    order = [2 * row + side for row, side in sides]
    return PreferenceDataset(samples.select(order), tuple(side == 0 for _, side in sides))
