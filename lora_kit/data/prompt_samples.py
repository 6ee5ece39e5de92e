"""Prompts without an answer as samples: the tokens that `generate` would be given, and the row that they come from."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lora_kit.data.batches import IGNORE_INDEX, EncodedDataset
from lora_kit.data.cells import RowError
from lora_kit.data.messages import Conversation
from lora_kit.data.prompt_rows import parse_prompt_row
from lora_kit.data.row_encoders import EncodedRow
from lora_kit.data.rows import Rows
from lora_kit.data.sample_format import SampleFormat
from lora_kit.errors import DataError
from lora_kit.models.prompt_tokens import (
    cut_beginning,
    find_special_tokens,
    render_prompt,
    tokenize_prompt,
    tokenize_text,
)
from lora_kit.models.protocols import Tokenizer

PROMPT: Final = "prompt"
"""The kind of these samples."""
PROMPT_IDS: Final = "prompt_ids"
"""The key of an item under which the tokens of its prompt are."""


def encode_prompts(rows: Rows, tokenizer: Tokenizer, sample_format: SampleFormat) -> Iterator[EncodedRow]:
    """Encode each row as one sample without a label: the tokens that `generate` is given for its prompt.

    A prompt that leaves less than `answer_tokens` of `max_length` loses tokens on its left.
    """
    prefix, _ = find_special_tokens(tokenizer)
    budget = sample_format.max_length - sample_format.answer_tokens
    for prompt, _ in rows.values:
        try:
            ids = _tokenize(prompt, tokenizer, sample_format)
        except DataError as error:  # the template rejects this conversation
            yield EncodedRow(0, error=RowError(error.message))
            continue
        kept = cut_beginning(ids, prefix, budget)
        if not kept:
            yield EncodedRow(len(ids), error=RowError("the prompt has no token"))
            continue
        yield EncodedRow(len(ids), [(kept, [IGNORE_INDEX] * len(kept))], cut=len(ids) > budget)


def _tokenize(prompt: str | Conversation, tokenizer: Tokenizer, sample_format: SampleFormat) -> list[int]:
    if isinstance(prompt, str):
        return tokenize_prompt(tokenizer, render_prompt(prompt, separator=sample_format.separator))
    if sample_format.template is None:
        raise DataError("a conversation, and no chat template was given")
    return tokenize_text(tokenizer, sample_format.template.render_prompt(tokenizer, prompt))


@dataclass(frozen=True)
class PromptDataset(torch.utils.data.Dataset[dict[str, object]]):
    """Prompts; an item is the row as it was written, with the tokens of its prompt as `prompt_ids`.

    A row that lacks a column which others have has None there.

    Attributes:
        samples: the tokens, one sample for each row.
        rows: where they come from.
    """

    samples: EncodedDataset
    rows: Rows

    @property
    def kind(self) -> str:
        return PROMPT

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, object]:
        ids = self.samples[index]["input_ids"].tolist()
        return {**dict.fromkeys(self.columns), **parse_prompt_row(self.rows.values[index]), PROMPT_IDS: ids}

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns of all rows, in the order in which they first occur."""
        return tuple(dict.fromkeys(key for value in self.rows.values for key in parse_prompt_row(value)))

    @property
    def lengths(self) -> Tensor:
        """Tokens of each prompt: int64 (rows,)."""
        return self.samples.lengths

    @property
    def num_tokens(self) -> int:
        return self.samples.num_tokens

    @property
    def num_labels(self) -> int:
        """Tokens of the answers: none is known before the model writes it."""
        return 0
