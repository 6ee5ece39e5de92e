"""The model's answers to validation rows before and after a training, for the report: the rows as they were written."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import torch

from lora_kit.data.batches import EncodedDataset
from lora_kit.data.preferences import FEEDBACK_FORMATS, PAIR_FORMATS, get_answer_format, get_first_answer
from lora_kit.data.prompt_rows import PROMPT_FORMATS
from lora_kit.data.rows import Rows
from lora_kit.evaluation.eval_cases import build_cases
from lora_kit.evaluation.eval_report import EvalCase
from lora_kit.evaluation.forward import run_forward
from lora_kit.evaluation.generation_metrics import EvalPrompt, collect_eval_prompts, convert_prompt, cut_prompt
from lora_kit.evaluation.label_answers import name_answers
from lora_kit.evaluation.outcomes import ModelAnswers, Outcomes, measure_misses
from lora_kit.generation.decoding import Sampling, generate_batch
from lora_kit.generation.prompts import EncodedPrompt, encode_prompt
from lora_kit.models.tasks import NEXT, SEQ2SEQ, TEXT_KINDS, WORD
from lora_kit.torch_utils import use_eval_mode
from lora_kit.training.job.job import Job
from lora_kit.training.recipe.objectives import SFT

logger = logging.getLogger(__name__)

BEFORE, AFTER = "before", "after"
SAMPLE_COUNT: Final = 6
"""Prompts that are answered; 0 leaves labels out, too."""
MAX_LABELED: Final = 2_000
"""Rows whose labels are predicted, at most."""
MAX_ANSWER_TOKENS: Final = 48
"""Tokens of an answer, at most."""
_CANDIDATES: Final = 120
"""Prompts of which those that differ most from one another are answered."""
_OPENING: Final = re.compile(r"\s*(?:\S+\s+){0,9}\S+")
"""The words from the beginning of a text that are its prompt, where it has none."""

T = TypeVar("T")


class SampleAnswers:
    """The answers of a job's model to some validation rows: greedy, so that they repeat from run to run.

    Empty without validation rows, and where the objective is a reward.
    """

    def __init__(self, job: Job) -> None:
        self._answers = _try_or_warn(lambda: _choose_answers(job))
        self._before = None if self._answers is None else _try_or_warn(lambda: self._ask(BEFORE))

    def after(self, thresholds: Sequence[float] = ()) -> Outcomes | None:
        """Return the rows with the answers from the creation of this object and from now; None where there are none.

        Args:
            thresholds: of labels of which any number may apply; empty for 0.5.
        """
        if self._answers is None or self._before is None:
            return None
        after = _try_or_warn(lambda: self._ask(AFTER, thresholds))
        if after is None:
            return None
        return dataclasses.replace(self._answers.outcomes, models=(self._before, after))

    def _ask(self, name: str, thresholds: Sequence[float] = ()) -> ModelAnswers:
        assert self._answers is not None
        with use_eval_mode(self._answers.job.base.model), torch.no_grad():
            return self._answers.ask(name, thresholds)


def _try_or_warn(ask: Callable[[], T]) -> T | None:
    """Return answers; None, with a warning, where the model fails: a report is no reason to stop."""
    try:
        return ask()
    except Exception as error:
        logger.warning("no samples in the report: %s: %s", type(error).__name__, " ".join(str(error).split()))
        return None


def _choose_answers(job: Job) -> _LabelAnswers | _TextAnswers | None:
    rows = job.validation_rows
    if rows is None or not SAMPLE_COUNT:
        return None
    if job.labels:
        is_labeled = isinstance(job.validation, EncodedDataset) and job.validation.kind in (*TEXT_KINDS, WORD)
        return _LabelAnswers(job, rows) if is_labeled else None
    return _TextAnswers(job, rows)


class _LabelAnswers:
    """What a model predicts of labeled rows, spread evenly over the file."""

    def __init__(self, job: Job, rows: Rows) -> None:
        self.job = job
        positions = _spread(len(rows), MAX_LABELED)
        self._samples = job.validation.select(positions)
        cases = tuple(build_cases(rows.only(positions), ()))
        self.outcomes = Outcomes(self._samples.kind, cases, (), job.labels, BEFORE, total=len(rows))

    def ask(self, name: str, thresholds: Sequence[float]) -> ModelAnswers:
        job, samples = self.job, self._samples
        size = int(job.recipe.train.get("per_device_eval_batch_size", 16))
        forward = run_forward(job.base.model, samples, job.collator, batch_size=size, thresholds=thresholds)
        answers = name_answers(samples.kind, forward, job.labels)
        return ModelAnswers(name, answers, measure_misses(samples, forward, thresholds))


class _TextAnswers:
    """What a model writes after prompts that differ from one another."""

    def __init__(self, job: Job, rows: Rows) -> None:
        self.job = job
        prompts = _collect_prompts(job, rows)
        chosen = [prompts[index] for index in _choose_different([_flatten(each) for each in prompts])]
        style = job.sample_format.style if rows.format != "text" else ""
        longest = max(1, job.base.max_length - MAX_ANSWER_TOKENS) if job.base.task != SEQ2SEQ else job.base.max_length
        self._prompts: list[EncodedPrompt] = []
        for each in chosen:
            encoded = encode_prompt(job.base, convert_prompt(each, style), style)
            self._prompts.append(cut_prompt(job.base, encoded, longest))
        cases = tuple(EvalCase(each.lines, each.prompt, each.references) for each in chosen)
        self.outcomes = Outcomes(
            NEXT, cases, (), reference=BEFORE, total=len(rows), rejected=_find_rejected(rows, chosen)
        )

    def ask(self, name: str, thresholds: Sequence[float]) -> ModelAnswers:
        base, prompts = self.job.base, self._prompts
        if not prompts:
            return ModelAnswers(name, ())
        limit = MAX_ANSWER_TOKENS
        if base.task != SEQ2SEQ:
            limit = max(1, min(limit, base.max_length - max(len(prompt.ids) for prompt in prompts)))
        answers = generate_batch(base, prompts, sampling=Sampling(max_new_tokens=limit), limit=limit)
        return ModelAnswers(name, tuple(answer.text for answer in answers))


def _spread(count: int, most: int) -> list[int]:
    """Return at most `most` positions, spread evenly over `count`."""
    chosen = min(count, most)
    return sorted({index * count // chosen for index in range(chosen)})


def _collect_prompts(job: Job, rows: Rows) -> Sequence[EvalPrompt]:
    """Return prompts of rows that are spread evenly over the file, with what is to be written after each."""
    rows = rows.only(_spread(len(rows), _CANDIDATES))
    if rows.format == "text":
        return [_split_text(line, text) for line, (text,) in zip(rows.lines, rows.values, strict=True)]
    if rows.format in PROMPT_FORMATS:
        prompts = zip(rows.lines, rows.values, strict=True)
        return [EvalPrompt(prompt, (), (line,)) for line, (prompt, _) in prompts]
    values = tuple(get_first_answer(rows.format, value) for value in rows.values)
    answers = dataclasses.replace(rows, format=get_answer_format(rows.format), values=values)
    learn = job.recipe.data.learn if job.recipe.objective == SFT else "last"
    return collect_eval_prompts(answers, learn=learn)


def _split_text(line: int, text: str) -> EvalPrompt:
    """Return the first words of a text as a prompt, and what follows: up to as many words as an answer has tokens."""
    opening = _OPENING.match(text)
    end = opening.end() if opening is not None else 0
    if end == len(text):  # a text of few words
        end = max(1, len(text) // 2)
    return EvalPrompt(text[:end], (" ".join(text[end:].split(" ")[: MAX_ANSWER_TOKENS + 1]),), (line,))


def _find_rejected(rows: Rows, chosen: Sequence[EvalPrompt]) -> tuple[str, ...]:
    """Return what was rejected of each prompt where rows are preferences; of single answers whether they are good."""
    if rows.parts or rows.format not in (*PAIR_FORMATS, *FEEDBACK_FORMATS):  # lines of several files repeat
        return ()
    by_line = dict(zip(rows.lines, rows.values, strict=True))
    values = [by_line[each.lines[0]] for each in chosen]
    if rows.format in FEEDBACK_FORMATS:
        return tuple("no: it is good" if is_good else "the expected answer" for _, is_good in values)
    is_chat = get_answer_format(rows.format) == "chat"
    return tuple(worse[0].messages[-1].content if is_chat else worse[1] for _, worse in values)


def _flatten(prompt: EvalPrompt) -> str:
    given = prompt.prompt
    return given if isinstance(given, str) else " ".join(message.content for message in given.messages)


def _choose_different(texts: Sequence[str]) -> list[int]:
    """Return the indices of `SAMPLE_COUNT` texts, in order: the first, then always one that shares least words."""
    words = [frozenset(text.lower().split()) for text in texts]
    chosen = [0] if texts else []
    closest = [0.0] * len(texts)
    while chosen and len(chosen) < min(SAMPLE_COUNT, len(texts)):
        last = words[chosen[-1]]
        closest = [max(a, len(own & last) / max(len(own | last), 1)) for a, own in zip(closest, words, strict=True)]
        chosen.append(min((i for i in range(len(texts)) if i not in chosen), key=lambda index: closest[index]))
    return sorted(chosen)
