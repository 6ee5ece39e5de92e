"""One sample as the model will see it: its text, and on which parts of it there is a loss."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from lora_kit.data.batches import IGNORE_INDEX, EncodedDataset
from lora_kit.models.protocols import Tokenizer
from lora_kit.models.tasks import TARGET, TEXT_KINDS


@dataclass(frozen=True)
class Span:
    """Neighboring tokens that are all learned, or all not.

    Attributes:
        text: the decoded tokens, including special tokens.
        tokens: the number of tokens.
        learned: whether the loss is taken on them.
    """

    text: str
    tokens: int
    learned: bool


def preview_sample(tokenizer: Tokenizer, samples: EncodedDataset, index: int) -> list[Span]:
    """Return a sample as spans; what a decoder writes follows what its encoder reads.

    If something is predicted of the whole text, no token is learned; of a labeled word the first token is.
    """
    sample = samples[index]
    ids, labels = sample["input_ids"].tolist(), sample["labels"]
    learned = [False] * len(ids) if samples.kind in (*TEXT_KINDS, TARGET) else (labels != IGNORE_INDEX).tolist()
    if samples.kind == TARGET:
        ids, learned = ids + labels.tolist(), learned + [True] * len(labels)
    spans, start = [], 0
    for flag, group in groupby(learned):
        count = len(list(group))
        text = str(tokenizer.decode(ids[start : start + count], skip_special_tokens=False))
        spans.append(Span(text, count, flag))
        start += count
    return spans
