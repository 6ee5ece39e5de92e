"""A few validation samples with the model's answers before and after a training, for the report."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

import torch

from lora_kit.data.batches import IGNORE_INDEX, EncodedDataset
from lora_kit.evaluation.forward import run_forward
from lora_kit.evaluation.label_answers import describe_answer, name_answers, name_target
from lora_kit.generation.decoding import Sampling, decode_ids, generate_batch
from lora_kit.generation.prompts import EncodedPrompt, find_end_tokens
from lora_kit.models.tasks import GENERATIVE_KINDS, SEQ2SEQ, TARGET, TEXT_KINDS
from lora_kit.torch_utils import use_eval_mode
from lora_kit.training.job.job import Job

logger = logging.getLogger(__name__)

SAMPLE_COUNT: Final = 4
MAX_ANSWER_TOKENS: Final = 48
"""Tokens of an answer, at most."""
_OPENING_TOKENS: Final = 16
"""Tokens from the beginning of a text that are its prompt, where it has none."""


@dataclass(frozen=True)
class AnsweredSample:
    """A validation sample with the model's answers.

    Attributes:
        prompt: the text that the model was given.
        expected: the answer in the data.
        before: the model's answer before training.
        after: the model's answer after training.
    """

    prompt: str
    expected: str
    before: str
    after: str


class SampleAnswers:
    """The answers of a job's model to some validation samples: greedy, so that they repeat from run to run.

    Empty without validation rows, and for labels of words.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._positions = _choose_positions(job.validation)
        self._prompts = [_build_prompt(job, job.validation, position) for position in self._positions if job.validation]
        self._before = self._generate_answers()

    def after(self) -> tuple[AnsweredSample, ...]:
        """Return the samples with the answers from the creation of this object and from now."""
        answers = self._generate_answers()
        if not self._before or not answers:
            return ()
        rows = zip(self._prompts, self._before, answers, strict=True)
        return tuple(AnsweredSample(prompt.text, expected, before, after) for (prompt, expected), before, after in rows)

    def _generate_answers(self) -> list[str]:
        """Return the model's present answers; none, with a warning, where it fails: a report is no reason to stop."""
        if not self._prompts:
            return []
        try:
            with use_eval_mode(self._job.base.model), torch.no_grad():
                return self._predict_labels() if self._job.labels else self._generate_texts()
        except Exception as error:
            logger.warning("no samples in the report: %s: %s", type(error).__name__, " ".join(str(error).split()))
            return []

    def _generate_texts(self) -> list[str]:
        base = self._job.base
        prompts = [prompt for prompt, _ in self._prompts]
        limit = MAX_ANSWER_TOKENS
        if base.task != SEQ2SEQ:
            limit = min(limit, base.max_length - max(len(prompt.ids) for prompt in prompts))
        answers = generate_batch(base, prompts, sampling=Sampling(max_new_tokens=limit), limit=limit)
        return [answer.text for answer in answers]

    def _predict_labels(self) -> list[str]:
        job = self._job
        assert job.validation is not None
        samples = job.validation.select(self._positions)
        result = run_forward(job.base.model, samples, job.collator, batch_size=1)
        return [describe_answer(answer) for answer in name_answers(samples.kind, result, job.labels)]


def _choose_positions(samples: EncodedDataset | None) -> list[int]:
    """Return positions spread evenly over a data set."""
    if samples is None or samples.kind not in (*GENERATIVE_KINDS, *TEXT_KINDS):
        return []
    count = min(SAMPLE_COUNT, len(samples))
    return sorted({index * len(samples) // count for index in range(count)})


def _build_prompt(job: Job, samples: EncodedDataset, position: int) -> tuple[EncodedPrompt, str]:
    """Return a sample as a prompt, and the answer expected after it."""
    tokenizer, sample = job.base.tokenizer, samples[position]
    ids: list[int] = sample["input_ids"].tolist()
    if samples.kind in TEXT_KINDS:
        expected = describe_answer(name_target(samples.kind, sample["labels"], job.labels))
        return EncodedPrompt(decode_ids(tokenizer, ids), ids, frozenset()), expected
    labels: list[int] = sample["labels"].tolist()
    end_tokens = find_end_tokens(job.base)
    if samples.kind == TARGET:
        return EncodedPrompt(decode_ids(tokenizer, ids), ids, end_tokens), decode_ids(tokenizer, labels)
    first = next(index for index, label in enumerate(labels) if label != IGNORE_INDEX)
    last = next((index for index in range(first, len(ids)) if labels[index] == IGNORE_INDEX), len(ids)) - 1
    if first <= 1:  # a text without a prompt: its opening is the prompt
        first = max(1, min(_OPENING_TOKENS, len(ids) // 2))
    else:
        end_tokens |= {ids[last]}
    # A long prompt loses tokens on its left, since an answer depends most on the last ones.
    prompt = ids[max(0, first - max(1, job.base.max_length - MAX_ANSWER_TOKENS)) : first]
    expected = decode_ids(tokenizer, ids[first : last + 1][:MAX_ANSWER_TOKENS])
    return EncodedPrompt(decode_ids(tokenizer, prompt), prompt, end_tokens), expected
