"""A few validation samples, answered before and after a training, for people to look at."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

import torch

from lora_kit.data.batches import GENERATIVE_KINDS, IGNORE_INDEX, LABEL, TARGET, EncodedDataset
from lora_kit.evaluation.forward import run_forward
from lora_kit.generation.decoding import Sampling, decode_ids, generate_batch
from lora_kit.generation.prompts import EncodedPrompt, find_end_tokens
from lora_kit.torch_utils import use_eval_mode
from lora_kit.training.job.job import Job

logger = logging.getLogger(__name__)

SAMPLE_COUNT: Final = 4
MAX_ANSWER_TOKENS: Final = 48
"""Tokens of an answer, at the most."""
_OPENING_TOKENS: Final = 16
"""Tokens of a text without a prompt that are given, to be gone on from."""


@dataclass(frozen=True)
class AnsweredSample:
    """What was asked, what the data says, and what the model said before and after the training."""

    prompt: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class _SamplePrompt:
    prompt: str
    ids: list[int]
    expected: str
    ends: frozenset[int]


class SampleAnswers:
    """Validation samples of a job: the likeliest answer to each, so that they repeat from run to run.

    There are none without validation rows, and none where every word has a label of its own.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._positions = _choose_positions(job.validation)
        self._sample_prompts = (
            [_build_sample_prompt(job, job.validation, place) for place in self._positions] if job.validation else []
        )
        self._before = self._generate_answers()

    def after(self) -> tuple[AnsweredSample, ...]:
        """The samples, answered once more."""
        answers = self._generate_answers()
        if not self._before or not answers:
            return ()
        told = zip(self._sample_prompts, self._before, answers, strict=True)
        return tuple(AnsweredSample(asked.prompt, asked.expected, before, after) for asked, before, after in told)

    def _generate_answers(self) -> list[str]:
        """What the model says as it stands; nothing, and that is logged, where it cannot: it is no reason to stop."""
        if not self._sample_prompts:
            return []
        try:
            with use_eval_mode(self._job.base.model), torch.no_grad():
                return self._predict_labels() if self._job.labels else self._texts()
        except Exception as error:
            logger.warning("no samples in the report: %s: %s", type(error).__name__, " ".join(str(error).split()))
            return []

    def _texts(self) -> list[str]:
        base = self._job.base
        rows = [EncodedPrompt(asked.prompt, asked.ids, asked.ends) for asked in self._sample_prompts]
        room = (
            MAX_ANSWER_TOKENS
            if base.task == "seq2seq"
            else min(MAX_ANSWER_TOKENS, base.max_length - max(len(row.ids) for row in rows))
        )
        return [each.text for each in generate_batch(base, rows, sampling=Sampling(max_new_tokens=room), limit=room)]

    def _predict_labels(self) -> list[str]:
        job = self._job
        assert job.validation is not None
        few = _select_samples(job.validation, self._positions)
        found = run_forward(job.base.model, few, job.collator, batch_size=1)
        return [job.labels[label] for (label,) in found.predicted]


def _choose_positions(samples: EncodedDataset | None) -> list[int]:
    """Places spread over a data set."""
    if samples is None or samples.kind not in (*GENERATIVE_KINDS, LABEL):
        return []
    count = min(SAMPLE_COUNT, len(samples))
    return sorted({place * len(samples) // count for place in range(count)})


def _build_sample_prompt(job: Job, samples: EncodedDataset, place: int) -> _SamplePrompt:
    """A sample as a prompt and what is to follow."""
    tokenizer, sample = job.base.tokenizer, samples[place]
    ids: list[int] = sample["input_ids"].tolist()
    if samples.kind == LABEL:
        return _SamplePrompt(decode_ids(tokenizer, ids), ids, job.labels[int(sample["labels"])], frozenset())
    labels: list[int] = sample["labels"].tolist()
    ends = find_end_tokens(job.base)
    if samples.kind == TARGET:
        return _SamplePrompt(decode_ids(tokenizer, ids), ids, decode_ids(tokenizer, labels), ends)
    first = next(index for index, label in enumerate(labels) if label != IGNORE_INDEX)
    last = next((index for index in range(first, len(ids)) if labels[index] == IGNORE_INDEX), len(ids)) - 1
    if first <= 1:  # a text: its opening is the prompt
        first = max(1, min(_OPENING_TOKENS, len(ids) // 2))
    else:
        ends |= {ids[last]}
    # The last tokens of a long prompt are those that an answer needs most.
    prompt = ids[max(0, first - max(1, job.base.max_length - MAX_ANSWER_TOKENS)) : first]
    return _SamplePrompt(
        decode_ids(tokenizer, prompt), prompt, decode_ids(tokenizer, ids[first : last + 1][:MAX_ANSWER_TOKENS]), ends
    )


def _select_samples(samples: EncodedDataset, places: list[int]) -> EncodedDataset:
    """Some samples with one label each."""
    return EncodedDataset(
        ids=torch.cat([samples[place]["input_ids"] for place in places]).int(),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), samples.lengths[places].cumsum(0)]),
        labels=samples.labels[places],
        kind=samples.kind,
        label_offsets=torch.arange(len(places) + 1),
    )
