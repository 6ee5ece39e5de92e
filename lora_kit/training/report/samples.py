"""A few validation samples, answered before and after a training, for people to look at."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

import torch

from lora_kit.data.batches import IGNORED, LABEL, TARGET, WRITTEN, Encoded
from lora_kit.evaluation.forward import forward
from lora_kit.generation.decoding import Sampling, text_of, write
from lora_kit.generation.prompts import Asked, end_tokens
from lora_kit.torch_utils import evaluating
from lora_kit.training.job.job import Job

logger = logging.getLogger(__name__)

COUNT: Final = 4
LENGTH: Final = 48
"""Tokens of an answer, at the most."""
_OPENING: Final = 16
"""Tokens of a text without a prompt that are given, to be gone on from."""


@dataclass(frozen=True)
class Sample:
    """What was asked, what the data says, and what the model said before and after the training."""

    prompt: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class _Question:
    prompt: str
    ids: list[int]
    expected: str
    ends: frozenset[int]


class Samples:
    """Validation samples of a job: the likeliest answer to each, so that they repeat from run to run.

    There are none without validation rows, and none where every word has a label of its own.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._places = _spread(job.validation)
        self._questions = [_question(job, job.validation, place) for place in self._places] if job.validation else []
        self._before = self._answers()

    def after(self) -> tuple[Sample, ...]:
        """The samples, answered once more."""
        answers = self._answers()
        if not self._before or not answers:
            return ()
        told = zip(self._questions, self._before, answers, strict=True)
        return tuple(Sample(asked.prompt, asked.expected, before, after) for asked, before, after in told)

    def _answers(self) -> list[str]:
        """What the model says as it stands; nothing, and that is logged, where it cannot: it is no reason to stop."""
        if not self._questions:
            return []
        try:
            with evaluating(self._job.base.model), torch.no_grad():
                return self._labels() if self._job.labels else self._texts()
        except Exception as error:
            logger.warning("no samples in the report: %s: %s", type(error).__name__, " ".join(str(error).split()))
            return []

    def _texts(self) -> list[str]:
        base = self._job.base
        rows = [Asked(asked.prompt, asked.ids, asked.ends) for asked in self._questions]
        room = LENGTH if base.task == "seq2seq" else min(LENGTH, base.max_length - max(len(row.ids) for row in rows))
        return [each.text for each in write(base, rows, sampling=Sampling(max_new_tokens=room), limit=room)]

    def _labels(self) -> list[str]:
        job = self._job
        assert job.validation is not None
        few = _subset(job.validation, self._places)
        found = forward(job.base.model, few, job.collator, batch_size=1)
        return [job.labels[label] for (label,) in found.predicted]


def _spread(samples: Encoded | None) -> list[int]:
    """Places spread over a data set."""
    if samples is None or samples.kind not in (*WRITTEN, LABEL):
        return []
    count = min(COUNT, len(samples))
    return sorted({place * len(samples) // count for place in range(count)})


def _question(job: Job, samples: Encoded, place: int) -> _Question:
    """A sample as a prompt and what is to follow."""
    tokenizer, sample = job.base.tokenizer, samples[place]
    ids: list[int] = sample["input_ids"].tolist()
    if samples.kind == LABEL:
        return _Question(text_of(tokenizer, ids), ids, job.labels[int(sample["labels"])], frozenset())
    labels: list[int] = sample["labels"].tolist()
    ends = end_tokens(job.base)
    if samples.kind == TARGET:
        return _Question(text_of(tokenizer, ids), ids, text_of(tokenizer, labels), ends)
    first = next(index for index, label in enumerate(labels) if label != IGNORED)
    last = next((index for index in range(first, len(ids)) if labels[index] == IGNORED), len(ids)) - 1
    if first <= 1:  # a text: its opening is the prompt
        first = max(1, min(_OPENING, len(ids) // 2))
    else:
        ends |= {ids[last]}
    # The last tokens of a long prompt are those that an answer needs most.
    prompt = ids[max(0, first - max(1, job.base.max_length - LENGTH)) : first]
    return _Question(text_of(tokenizer, prompt), prompt, text_of(tokenizer, ids[first : last + 1][:LENGTH]), ends)


def _subset(samples: Encoded, places: list[int]) -> Encoded:
    """Some samples with one label each."""
    return Encoded(
        ids=torch.cat([samples[place]["input_ids"] for place in places]).int(),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), samples.lengths[places].cumsum(0)]),
        labels=samples.labels[places],
        kind=samples.kind,
        label_offsets=torch.arange(len(places) + 1),
    )
