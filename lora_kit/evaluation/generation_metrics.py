"""What a model is asked, and what it answers: the prompts of a file, put in one style, and one text for each."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_kit.bank.bank import AdapterBank
from lora_kit.data.chat import ChatTemplate
from lora_kit.data.layouts import Message
from lora_kit.data.rows import Rows
from lora_kit.errors import ConfigError, DataError
from lora_kit.generation.decoding import Completion, Sampling, generate_batch
from lora_kit.generation.generate import route_rows
from lora_kit.generation.prompts import EncodedPrompt, PromptStyle, encode_prompt
from lora_kit.models.loading import Base
from lora_kit.models.prompt_tokens import find_special_tokens
from lora_kit.models.tasks import SEQ2SEQ
from lora_kit.torch_utils import use_autocast, use_eval_mode

logger = logging.getLogger(__name__)

Prompt = str | tuple[Message, ...]
"""A text, or a conversation so far."""


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt of a file and every answer to it that stands there: references of one another.

    Attributes:
        prompt: the text, or the conversation so far.
        references: the answers, in the order of the file.
        lines: where they stand.
    """

    prompt: Prompt
    references: tuple[str, ...]
    lines: tuple[int, ...]


@dataclass(frozen=True)
class GenerationTask:
    """Questions put to a model in one style.

    Attributes:
        base: that is asked.
        questions: in the order of the file.
        rows: their prompts in that style.
        max_new_tokens: most tokens of an answer.
    """

    base: Base
    questions: tuple[EvalPrompt, ...]
    rows: tuple[EncodedPrompt, ...]
    max_new_tokens: int

    @property
    def references(self) -> list[tuple[str, ...]]:
        return [question.references for question in self.questions]


def collect_eval_prompts(rows: Rows) -> tuple[EvalPrompt, ...]:
    """The questions of a file: its prompts, each once; of a conversation every answer, after all that stands before it.

    Raises:
        DataError: rows of this format ask nothing.
    """
    found: dict[Prompt, list[tuple[str, int]]] = {}
    for value, line in zip(rows.values, rows.lines, strict=True):
        if rows.format == "completion":
            found.setdefault(value[0], []).append((value[1], line))
        elif rows.format == "chat":
            for number, (role, text) in enumerate(value[0]):
                if role == "assistant":
                    found.setdefault(value[0][:number], []).append((text, line))
        else:
            raise DataError(
                f"{rows.path} has rows of the format {rows.format}, which ask nothing",
                hint="what is written is measured on prompts and completions, or on conversations",
            )
    return tuple(
        EvalPrompt(prompt, tuple(text for text, _ in each), tuple(line for _, line in each))
        for prompt, each in found.items()
    )


def build_generation_task(
    base: Base, questions: Sequence[EvalPrompt], style: PromptStyle, *, max_new_tokens: int | None = None
) -> GenerationTask:
    """Questions in a style. A prompt without room for an answer after it is cut as in training, and that is logged.

    Args:
        max_new_tokens: most tokens of an answer; None for as many as the longest reference has, with its end.

    Raises:
        DataError: a prompt cannot be put in this style.
        ConfigError: an answer may fill the base's whole context.
    """
    limit = max_new_tokens or _measure_longest_reference(base, questions)
    room = base.max_length - (1 if base.task == SEQ2SEQ else limit)
    if room < 1 or limit >= base.max_length:
        what = f"an answer may have {limit:,} tokens; {base.name} sees {base.max_length:,} at once"
        raise ConfigError(what, hint="give a smaller max_new_tokens")
    whole = [encode_prompt(base, _convert_prompt(question, style), style) for question in questions]
    cut = sum(len(row.ids) > room for row in whole)
    if cut:
        side = "at the end" if base.task == SEQ2SEQ else "on the left"
        logger.warning("%d of %d prompts were cut %s to fit %d tokens", cut, len(whole), side, room)
    return GenerationTask(base, tuple(questions), tuple(_cut_prompt(base, row, room) for row in whole), limit)


def _measure_longest_reference(base: Base, questions: Sequence[EvalPrompt]) -> int:
    texts = [text for question in questions for text in question.references]
    ids = base.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return max(map(len, ids)) + 1


def _convert_prompt(question: EvalPrompt, style: PromptStyle) -> Prompt:
    """The prompt as the style takes it: a single message is a text to an adapter that knows no conversations."""
    prompt = question.prompt
    if isinstance(style, ChatTemplate) or isinstance(prompt, str):
        return prompt
    if len(prompt) != 1:
        told = f"line {question.lines[0]} is a conversation, and there is no chat template to put it in"
        raise DataError(told, hint="an adapter that was trained on conversations brings one")
    return prompt[0][1]


def _cut_prompt(base: Base, row: EncodedPrompt, room: int) -> EncodedPrompt:
    if len(row.ids) <= room:
        return row
    before, after = find_special_tokens(base.tokenizer)
    if base.task == SEQ2SEQ:
        return dataclasses.replace(row, ids=row.ids[: max(0, room - len(after))] + after)
    kept = before if row.ids[: len(before)] == before and len(before) < room else []
    return dataclasses.replace(row, ids=kept + row.ids[len(row.ids) - (room - len(kept)) :])


def generate_completions(
    exams: Mapping[str, GenerationTask],
    *,
    bank: AdapterBank | None = None,
    batch_size: int,
    autocast: torch.dtype | None = None,
    on_rows: Callable[[str], None] | None = None,
) -> dict[str, list[Completion]]:
    """What is answered to each question of each exam, the likeliest token at a time.

    Args:
        exams: by the label of the adapter that takes it; all of one base.
        bank: with the adapters of those labels; rows of other labels are the base's. None: with what is active.
        batch_size: rows at once. A batch that one adapter does not fill takes rows of the next one.
        autocast: dtype to compute in; None for the model's own.
        on_rows: called with the label of each row that is done.
    """
    places = [
        (label, place)
        for turn, (label, each) in enumerate(exams.items())
        # Up and down in turn: rows of two adapters in one batch are of like length.
        for place in sorted(range(len(each.rows)), key=lambda p: len(each.rows[p].ids), reverse=turn % 2 == 0)
    ]
    found: dict[tuple[str, int], Completion] = {}
    for start in range(0, len(places), batch_size):
        chosen = places[start : start + batch_size]
        first = exams[chosen[0][0]]  # they ask the same questions of one base, so they have one limit
        rows = [exams[label].rows[place] for label, place in chosen]
        sampling = Sampling(max_new_tokens=first.max_new_tokens)
        with (
            use_eval_mode(first.base.model),
            use_autocast(first.base.device, autocast),
            route_rows(bank, [label for label, _ in chosen]),
        ):
            written = generate_batch(first.base, rows, sampling=sampling, limit=first.max_new_tokens)
        for key, text in zip(chosen, written, strict=True):
            found[key] = text
            if on_rows is not None:
                on_rows(key[0])
    return {label: [found[label, place] for place in range(len(each.rows))] for label, each in exams.items()}
