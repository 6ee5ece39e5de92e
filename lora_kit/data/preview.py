"""One sample as the model will see it: its text, and on which parts of it there is a loss."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lora_kit.data.batches import IGNORE_INDEX, EncodedDataset
from lora_kit.models.tasks import LABEL, TARGET


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


def preview_sample(tokenizer: Any, samples: EncodedDataset, index: int) -> list[Span]:
    """A sample in spans, what a decoder writes after what its encoder reads.

    Where the whole text has one label, no token is learned; of words their first token is, by its label.
    """
    sample = samples[index]
    ids, labels = sample["input_ids"].tolist(), sample["labels"]
    learned = [False] * len(ids) if samples.kind in (LABEL, TARGET) else (labels != IGNORE_INDEX).tolist()
    if samples.kind == TARGET:
        ids, learned = ids + labels.tolist(), learned + [True] * len(labels)
    found, place = [], 0
    for flag, group in groupby(learned):
        count = len(list(group))
        text = str(tokenizer.decode(ids[place : place + count], skip_special_tokens=False))
        found.append(Span(text, count, flag))
        place += count
    return found
