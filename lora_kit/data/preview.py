"""One sample as the model will see it: its text, and on which parts of it there is a loss."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor

from lora_kit.data.encode import IGNORED


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens that are all learned, or all not.

    Attributes:
        text: what they read, special tokens included.
        tokens: how many there are.
        learned: whether the loss is taken on them.
    """

    text: str
    tokens: int
    learned: bool


def spans(tokenizer: Any, sample: dict[str, Tensor]) -> list[Span]:
    """A sample of `Encoded` in spans; where the whole text has one label, no token is learned."""
    ids = sample["input_ids"].tolist()
    learned = (sample["labels"] != IGNORED).tolist() if sample["labels"].ndim else [False] * len(ids)
    found, place = [], 0
    for flag, group in groupby(learned):
        count = len(list(group))
        text = str(tokenizer.decode(ids[place : place + count], skip_special_tokens=False))
        found.append(Span(text, count, flag))
        place += count
    return found
