"""Which special tokens end an answer in a chat template: found by rendering answers, and what may follow them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from lora_kit.data.messages import Conversation, Message
from lora_kit.data.templates import PROBE_CALL, PROBE_QUESTION, PROBE_TOOLS, ChatTemplate
from lora_kit.errors import DataError
from lora_kit.models.protocols import Tokenizer

_ANSWER: Final = Message("assistant", "the answer")
_RESULT: Final = Message("tool", "the result", name=PROBE_CALL.name, tool_call_id=PROBE_CALL.id)


@dataclass(frozen=True)
class AnswerEnds:
    """The special tokens that end answers in a template.

    Attributes:
        names: all of them, as text.
        after_text: what follows an answer at its end because the next message begins with it (`<|user|>`); None where
            the answer itself is rendered with its end.
        after_call: the same for an answer that calls a tool.
    """

    names: frozenset[str]
    after_text: str | None = None
    after_call: str | None = None


def find_template_ends(template: ChatTemplate, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that end an answer in a template, whether it calls a tool or not.

    Raises:
        DataError: the template puts no special token after an answer, so a model could not learn where to end.
    """
    names = find_special_names(tokenizer)
    return frozenset(names[name] for name in find_answer_ends(template, tokenizer).names)


def find_special_names(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the tokens that are not text, by name: those with a role, and those added as special (`<|end|>`)."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
    return {str(tokenizer.convert_ids_to_tokens(token)): token for token in ids - {tokenizer.unk_token_id}}


def compile_specials(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Return a pattern that matches one special token, the longest first."""
    names = sorted(find_special_names(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def count_shared(one: Sequence[object], other: Sequence[object]) -> int:
    """Return how many items two sequences begin with alike."""
    differing = (index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return next(differing, min(len(one), len(other)))


def find_tail(specials: re.Pattern[str], text: str) -> list[tuple[int, str]]:
    """Return the special tokens at the end of a text, with where each begins; white space may stand between them."""
    tail: list[tuple[int, str]] = []
    for match in specials.finditer(text):
        if tail and text[tail[-1][0] + len(tail[-1][1]) : match.start()].strip():
            tail.clear()
        tail.append((match.start(), match[0]))
    return tail if tail and not text[tail[-1][0] + len(tail[-1][1]) :].strip() else []


@lru_cache(maxsize=8)
def find_answer_ends(template: ChatTemplate, tokenizer: Tokenizer) -> AnswerEnds:
    """Return how a template ends answers; raises as `find_template_ends` does."""
    specials = compile_specials(tokenizer)
    question = Conversation((PROBE_QUESTION,))
    template.render(tokenizer, question.with_messages((PROBE_QUESTION, _ANSWER)))  # says what the template rejects
    end, after_text = _find_end(template, tokenizer, specials, question, _ANSWER, PROBE_QUESTION)
    if end is None:
        hint = "an answer ends with {{ eos_token }} or with another special token of the tokenizer"
        raise DataError(f"{template.name} puts no special token after an answer", hint=hint)
    calling = Conversation((PROBE_QUESTION,), tools=PROBE_TOOLS)
    for calls in ((PROBE_CALL, PROBE_CALL), (PROBE_CALL,)):  # some templates reject more than one call
        answer = Message("assistant", "", tool_calls=calls)
        asked = try_render(template, tokenizer, calling)
        full = try_render(template, tokenizer, calling.with_messages((PROBE_QUESTION, answer)))
        if full.count(PROBE_CALL.name) - asked.count(PROBE_CALL.name) >= len(calls):
            call_end, after_call = _find_end(template, tokenizer, specials, calling, answer, _RESULT)
            return AnswerEnds(frozenset({end, call_end or end}), after_text, after_call)
    return AnswerEnds(frozenset({end}), after_text)


def _find_end(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    specials: re.Pattern[str],
    before: Conversation,
    answer: Message,
    reply: Message,
) -> tuple[str | None, str | None]:
    """Return the special token that ends an answer, and the text with it that only a reply brings.

    Of several, the last one counts that stands there also once the conversation goes on, and that the answer holds
    once: `<|end|>`, and not the `<|endoftext|>` that some templates put after the whole conversation.
    """
    asked = try_render(template, tokenizer, before)
    full = try_render(template, tokenizer, before.with_messages((*before.messages, answer)))
    replied = try_render(template, tokenizer, before.with_messages((*before.messages, answer, reply)))
    tail = find_tail(specials, full)
    if tail:
        shared = count_shared(full, replied)
        lasting = [
            name for start, name in tail if start + len(name) <= shared and full.count(name) - asked.count(name) == 1
        ]
        return (lasting or [name for _, name in tail])[-1], None
    following = replied.removeprefix(full)
    match = specials.match(following.lstrip())
    if not match or following == replied:
        return None, None
    return match[0], following[: len(following) - len(following.lstrip())] + match[0]


def try_render(template: ChatTemplate, tokenizer: Tokenizer, conversation: Conversation) -> str:
    """Return a rendered conversation, or an empty text if the template rejects it."""
    try:
        return template.render(tokenizer, conversation)
    except DataError:
        return ""
