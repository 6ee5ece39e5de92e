"""Where an answer stands in a rendered conversation: what generation is given, and what it then has to write.

For the answer at index i, `prompt = render(messages[:i], add_generation_prompt)` and `full = render(messages[:i + 1])`:

    full = prompt + answer + whatever a template puts after the token that ends the answer, which is never generated

A prompt may open a thought that `full` does not show (`<think>`); the answer then closes it. With an answer a template
may take earlier thoughts out again; generation is still given them. Any other difference is an error, for training
would see what generation does not.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lora_kit.data.answer_ends import AnswerEnds, compile_specials, count_shared, find_answer_ends, find_tail
from lora_kit.data.messages import Conversation, Message
from lora_kit.data.rendered_checks import check_answer, contains_reasoning, split_inline_thought
from lora_kit.data.templates import ChatTemplate
from lora_kit.errors import DataError
from lora_kit.models.protocols import Tokenizer

_OPEN_THOUGHT: Final = re.compile(r"<(think|thinking|thought|reasoning)>(\s*)\Z")
"""The tag that a generation prompt may end with, and the white space after it."""
_PARTIAL_TAG: Final = re.compile(r"<[^<>\n]*\Z")


@dataclass(frozen=True)
class Answer:
    """An answer in its rendered conversation.

    Attributes:
        index: of the message.
        prompt: what generation is given.
        text: what it has to write, with the token that ends it.
        spans: where `prompt + text` is learned, in characters: (start, end).
    """

    index: int
    prompt: str
    text: str
    spans: tuple[tuple[int, int], ...]

    @property
    def through(self) -> str:
        """The rendered conversation through the end of this answer."""
        return self.prompt + self.text


def locate_answer(template: ChatTemplate, tokenizer: Tokenizer, conversation: Conversation, index: int) -> Answer:
    """Locate one answer of a conversation.

    Raises:
        DataError: the template rejects the conversation, does not render all that the answer says, or renders it so
            that generation could not write it; the message names a way out where there is one.
    """
    try:
        return _locate(template, tokenizer, conversation, index)
    except DataError as error:
        way_out = _find_way_out(template, tokenizer, conversation, index)
        raise DataError(f"{error.message}; {way_out}" if way_out else error.message, hint=error.hint) from None


def _locate(template: ChatTemplate, tokenizer: Tokenizer, conversation: Conversation, index: int) -> Answer:
    ends = find_answer_ends(template, tokenizer)
    message = conversation.messages[index]
    prompt = template.render_prompt(tokenizer, conversation.until(index))
    full = template.render(tokenizer, conversation.until(index + 1))
    continues = full.startswith(prompt)
    rest = full[len(prompt) :] if continues else _find_after_shortened(template, tokenizer, conversation, index, full)
    if rest is None:
        history = template.render(tokenizer, conversation.until(index))
        rest = _bridge(template, prompt, full, history, message, index)
    text, end = _cut_at_end(template, tokenizer, rest, message, ends)
    check_answer(template, tokenizer, conversation, index, text)
    learned: tuple[tuple[int, int], ...] = ((len(prompt), len(prompt) + len(text)),)
    if template.has_marks and continues:
        learned = _read_marks(template, tokenizer, conversation, index, learned[0], len(prompt) + end)
    return Answer(index, prompt, text, learned)


def _cut_at_end(
    template: ChatTemplate, tokenizer: Tokenizer, rest: str, message: Message, ends: AnswerEnds
) -> tuple[str, int]:
    """Return an answer through the token that ends it, and where that token begins.

    Args:
        rest: what the template renders from the beginning of the answer on.
    """
    tail = [place for place in find_tail(compile_specials(tokenizer), rest) if place[1] in ends.names]
    implied = ends.after_call if message.tool_calls else ends.after_text
    if tail:
        start, name = tail[-1]
        text = rest[: start + len(name)]
    elif implied:
        start, text = len(rest), rest + implied
    else:
        raise DataError(f"{template.name} does not end every answer as it ends the first")
    inside = next((name for name in ends.names if name in rest[:start]), None)
    if inside:
        raise DataError(f"an answer contains {inside}, at which generation would stop")
    return text, start


def _find_after_shortened(
    template: ChatTemplate, tokenizer: Tokenizer, conversation: Conversation, index: int, full: str
) -> str | None:
    """Return what is rendered of an answer with which the template shortens earlier ones; None if it shortens none.

    Some keep the thoughts between calls of tools until there is an answer without a call (gpt-oss). What generation is
    given then still has them. They are what is shortened if nothing changes without them, and the answer is what
    follows the prompt of the conversation without them.

    Args:
        full: the conversation through the answer.
    """
    for strip in (_drop_thought, _drop_all_but_calls):
        bare = conversation.with_messages((*map(strip, conversation.messages[:index]), conversation.messages[index]))
        if bare.messages != conversation.messages[: index + 1] and template.render(tokenizer, bare) == full:
            prompt = template.render_prompt(tokenizer, bare.until(index))
            if full.startswith(prompt):
                return full[len(prompt) :]
    return None


def _drop_thought(message: Message) -> Message:
    return dataclasses.replace(message, reasoning="")


def _drop_all_but_calls(message: Message) -> Message:
    content = "" if message.tool_calls else message.content
    return dataclasses.replace(message, reasoning="", content=content)


def _bridge(template: ChatTemplate, prompt: str, full: str, history: str, message: Message, index: int) -> str:
    """Return what has to be written after a prompt that the rendered conversation does not go on from.

    Args:
        prompt: the conversation before the answer, and the beginning of the answer.
        full: the conversation through the answer.
        history: the conversation before the answer.
    """
    shared = _share_prefix(prompt, full)
    opened, rest = prompt[len(shared) :], full[len(shared) :]
    thought = _OPEN_THOUGHT.search(opened)
    if len(shared) < len(_share_prefix(prompt, history)):
        what = f"{template.name} renders what precedes message {index + 1} differently once that message is there"
        raise DataError(f"{what}, so generation would be given another text")
    if not opened.strip():
        return rest
    reasoning = message.reasoning or split_inline_thought(message.content)[0]
    if thought is None or (reasoning and contains_reasoning(message, rest)):
        begun, rendered = f"{opened!r} in generation", f"{rest[:40]!r} in message {index + 1}"
        raise DataError(f"{template.name} begins an answer with {begun}, and with {rendered}")
    line_break = "" if thought[2] else "\n"
    return f"{line_break}{reasoning.strip()}\n</{thought[1]}>\n\n{rest}"


def _share_prefix(one: str, other: str) -> str:
    """Return how two texts begin alike, without a tag that is only half alike."""
    return _PARTIAL_TAG.sub("", one[: count_shared(one, other)])


def _read_marks(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    conversation: Conversation,
    index: int,
    answer: tuple[int, int],
    end: int,
) -> tuple[tuple[int, int], ...]:
    """Return which parts of an answer the template marks as generated, and the token that ends the answer.

    Args:
        answer: where the answer stands in the rendered conversation.
        end: where the token that ends it begins.
    """
    marks = template.find_marks(tokenizer, conversation.until(index + 1))
    inside = [(max(start, answer[0]), min(stop, end)) for start, stop in marks]
    inside = [(start, stop) for start, stop in inside if start < stop]
    if not inside:
        raise DataError(f"{template.name} marks nothing of message {index + 1} as generated")
    return _join_spans([*inside, (end, answer[1])])


def _join_spans(spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return tuple(joined)


def _find_way_out(template: ChatTemplate, tokenizer: Tokenizer, conversation: Conversation, index: int) -> str:
    """Return which variable of the template makes the answer learnable; empty if none does."""
    for name in template.list_variables():
        for value in (False, True):
            if "think" not in name or name in conversation.variables:
                continue
            other = template.with_variables({**template.variables, name: value})
            try:
                _locate(other, tokenizer, conversation, index)
            except DataError:
                continue
            return f"chat_template_kwargs: {{{name}: {str(value).lower()}}} renders it"
    return ""
