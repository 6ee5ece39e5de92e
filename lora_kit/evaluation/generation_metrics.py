"""Generation for metrics: the prompts of a file, encoded in the style of an adapter, and a completion of each."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_kit.bank.bank import AdapterBank
from lora_kit.data.messages import ALL, Conversation, find_learned_answers
from lora_kit.data.rows import Rows
from lora_kit.data.sample_format import PromptStyle
from lora_kit.data.templates import ChatTemplate
from lora_kit.errors import ConfigError, DataError
from lora_kit.evaluation.peers import NO_PEERS, Peers, merge_results, share_work
from lora_kit.generation.decoding import Completion, Sampling, generate_batch
from lora_kit.generation.generate import route_rows
from lora_kit.generation.prompts import EncodedPrompt, encode_prompt
from lora_kit.models.loading import Base
from lora_kit.models.prompt_tokens import cut_beginning, find_special_tokens
from lora_kit.models.tasks import SEQ2SEQ
from lora_kit.torch_utils import use_autocast, use_eval_mode

logger = logging.getLogger(__name__)

Prompt = str | Conversation
"""A text, or a conversation so far."""


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt, and every answer to it in a file.

    Attributes:
        prompt: the text, or the conversation so far.
        references: the answers, in the order of the file.
        lines: lines of the answers.
    """

    prompt: Prompt
    references: tuple[str, ...]
    lines: tuple[int, ...]


@dataclass(frozen=True)
class GenerationTask:
    """Prompts to be completed by a model, encoded in one style.

    Attributes:
        base: the base that completes them.
        prompts: in the order of the file.
        rows: the encoded prompts, in the same order.
        max_new_tokens: most tokens of a completion.
    """

    base: Base
    prompts: tuple[EvalPrompt, ...]
    rows: tuple[EncodedPrompt, ...]
    max_new_tokens: int

    @property
    def references(self) -> list[tuple[str, ...]]:
        """The right answers to each prompt."""
        return [prompt.references for prompt in self.prompts]


def collect_eval_prompts(rows: Rows, *, learn: str = ALL) -> tuple[EvalPrompt, ...]:
    """Return the prompts of a file, each once; in a conversation every answer follows everything before it.

    Args:
        learn: which answers of a conversation count; see `lora_kit.data.messages.LEARN`.

    Raises:
        DataError: rows of this format have no prompts.
    """
    answers: dict[Prompt, list[tuple[str, int]]] = {}
    for value, line in zip(rows.values, rows.lines, strict=True):
        if rows.format == "completion":
            answers.setdefault(value[0], []).append((value[1], line))
        elif rows.format == "chat":
            for number in find_learned_answers(value[0], learn):
                answers.setdefault(value[0].until(number), []).append((value[0].messages[number].content, line))
        else:
            raise DataError(
                f"{rows.path} has rows of the format {rows.format}, which have no prompts",
                hint="what is written is measured on prompts and completions, or on conversations",
            )
    return tuple(
        EvalPrompt(prompt, tuple(text for text, _ in each), tuple(line for _, line in each))
        for prompt, each in answers.items()
    )


def build_generation_task(
    base: Base, prompts: Sequence[EvalPrompt], style: PromptStyle, *, max_new_tokens: int | None = None
) -> GenerationTask:
    """Encode prompts in a style; one that leaves no tokens for an answer is cut as in training, with a warning.

    Args:
        max_new_tokens: most tokens of a completion; None for as many as the longest reference has, with its end.

    Raises:
        DataError: a prompt cannot be encoded in this style.
        ConfigError: a completion may fill the base's whole context.
    """
    limit = max_new_tokens or _measure_longest_reference(base, prompts)
    budget = base.max_length - (1 if base.task == SEQ2SEQ else limit)
    if budget < 1 or limit >= base.max_length:
        what = f"an answer may have {limit:,} tokens; {base.name} sees {base.max_length:,} at once"
        raise ConfigError(what, hint="give a smaller max_new_tokens")
    rows = [encode_prompt(base, convert_prompt(prompt, style), style) for prompt in prompts]
    cut = sum(len(row.ids) > budget for row in rows)
    if cut:
        side = "at the end" if base.task == SEQ2SEQ else "on the left"
        logger.warning("%d of %d prompts were cut %s to fit %d tokens", cut, len(rows), side, budget)
    return GenerationTask(base, tuple(prompts), tuple(cut_prompt(base, row, budget) for row in rows), limit)


def _measure_longest_reference(base: Base, prompts: Sequence[EvalPrompt]) -> int:
    """Return the tokens of the longest reference, with its end."""
    texts = [text for prompt in prompts for text in prompt.references]
    ids = base.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return max(map(len, ids)) + 1


def convert_prompt(prompt: EvalPrompt, style: PromptStyle) -> Prompt:
    """Return a prompt as the style takes it: without a chat template, a single message is a text."""
    if isinstance(style, ChatTemplate) or isinstance(prompt.prompt, str):
        return prompt.prompt
    if len(prompt.prompt.messages) != 1 or not prompt.prompt.is_plain:
        message = f"line {prompt.lines[0]} is a conversation, but there is no chat template for it"
        raise DataError(message, hint="an adapter that was trained on conversations brings one")
    return prompt.prompt.messages[0].content


def cut_prompt(base: Base, row: EncodedPrompt, budget: int) -> EncodedPrompt:
    """Return a prompt with at most `budget` tokens: without its beginning, or for an encoder without its end."""
    if len(row.ids) <= budget:
        return row
    prefix, suffix = find_special_tokens(base.tokenizer)
    if base.task == SEQ2SEQ:
        return dataclasses.replace(row, ids=row.ids[: max(0, budget - len(suffix))] + suffix)
    return dataclasses.replace(row, ids=cut_beginning(row.ids, prefix, budget))


def generate_completions(
    tasks: Mapping[str, GenerationTask],
    *,
    bank: AdapterBank | None = None,
    batch_size: int,
    autocast: torch.dtype | None = None,
    on_rows: Callable[[str], None] | None = None,
    peers: Peers = NO_PEERS,
) -> dict[str, list[Completion]]:
    """Complete the prompts of all tasks by greedy decoding.

    Args:
        tasks: tasks with the same prompts and one base, by the label of the adapter.
        bank: a bank with the adapters of those labels; rows of other labels are routed to the base. None to use what is
            active.
        batch_size: rows in one batch. A batch that one adapter does not fill takes rows of the next one.
        autocast: dtype to compute in; None for the model's own.
        on_rows: called with the label of each finished row.
        peers: processes that do the same, and share the batches.
    """
    order = [
        (label, index)
        for turn, (label, task) in enumerate(tasks.items())
        # Alternate long to short and short to long: rows of two adapters in one batch then have similar lengths.
        for index in sorted(range(len(task.rows)), key=lambda row: len(task.rows[row].ids), reverse=turn % 2 == 0)
    ]
    completions: dict[tuple[str, int], Completion] = {}
    for _, start in share_work(range(0, len(order), batch_size), peers):
        batch = order[start : start + batch_size]
        first = tasks[batch[0][0]]  # tasks of the same prompts and one base have the same limit
        rows = [tasks[label].rows[index] for label, index in batch]
        sampling = Sampling(max_new_tokens=first.max_new_tokens)
        with (
            use_eval_mode(first.base.model),
            use_autocast(first.base.device, autocast),
            route_rows(bank, [label for label, _ in batch]),
        ):
            generated = generate_batch(first.base, rows, sampling=sampling, limit=first.max_new_tokens)
        for key, completion in zip(batch, generated, strict=True):
            completions[key] = completion
            if on_rows is not None:
                on_rows(key[0])
    completions = merge_results(completions, peers)
    return {label: [completions[label, index] for index in range(len(task.rows))] for label, task in tasks.items()}
