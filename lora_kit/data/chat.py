"""Conversations as tokens: the chat template renders them, and the loss is on what the assistant says.

Where an answer begins and ends is found by rendering the conversation up to it and through it. Both must be a beginning
of the whole conversation as rendered, so that training sees what generation will see; a template of which that is not
true (some take earlier thoughts out again) is refused. An answer is learned with the token that ends it.

The template decides about the BOS: nothing is added to what it renders, in training or in generation.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lora_kit.data.layouts import Message, RowError
from lora_kit.data.readers import LONG
from lora_kit.errors import DataError
from lora_kit.models.prompt_tokens import find_special_tokens, tokenize_text

logger = logging.getLogger(__name__)

PLAIN: Final = "plain"
"""The name of the template below."""
_PLAIN_TEXT: Final = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    # A line break that follows a block is taken away by transformers' Jinja, one in an expression is not.
    "{{ eos_token if message['role'] == 'assistant' }}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
_MAX_TEMPLATE_BYTES: Final = 2**20

Sample = tuple[list[int], list[bool]]
"""Tokens, and on which of them there is a loss."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, rendered in the sandbox of transformers.

    Attributes:
        text: the template.
        name: what it is called in errors.
    """

    text: str
    name: str

    def asked(self, tokenizer: Any, messages: Sequence[Message]) -> str:
        """The conversation so far and the beginning of an answer: what generation goes on from.

        Raises:
            DataError: the template does not take this conversation.
        """
        return self._render(tokenizer, messages, add_generation_prompt=True)

    def told(self, tokenizer: Any, messages: Sequence[Message]) -> str:
        """The conversation; raises as `asked` does."""
        return self._render(tokenizer, messages, add_generation_prompt=False)

    def _render(self, tokenizer: Any, messages: Sequence[Message], **settings: Any) -> str:
        given = [{"role": role, "content": content} for role, content in messages]
        try:
            text = tokenizer.apply_chat_template(given, chat_template=self.text, tokenize=False, **settings)
        except Exception as error:  # whatever a template of others raises
            raise DataError(f"{self.name}: {' '.join(str(error).split())}") from None
        return str(text)

    def end(self, tokenizer: Any) -> int:
        """The token that ends an answer.

        Raises:
            DataError: the template puts no special token after one, so a model could not learn where to end.
        """
        text = self.told(tokenizer, [("user", "a"), ("assistant", "b")]).rstrip()
        ends = [token for token in _special_ids_of(tokenizer) if text.endswith(tokenizer.convert_ids_to_tokens(token))]
        if not ends:
            hint = "an answer ends with {{ eos_token }} or with another special token of the tokenizer"
            raise DataError(f"{self.name} puts no special token after an answer", hint=hint)
        return max(ends, key=lambda token: len(tokenizer.convert_ids_to_tokens(token)))


def chat_template_of(tokenizer: Any) -> str | None:
    """The chat template that a tokenizer brings, if it brings one."""
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def chat_template(given: str | None, tokenizer: Any, *, base: str) -> ChatTemplate:
    """The template that is asked for.

    Args:
        given: None for the tokenizer's own, `plain`, the text of a template (it holds `{{` or `{%`), or its file.
        base: what the tokenizer's model is called.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    if given is None:
        own = chat_template_of(tokenizer)
        if not own:
            hint = f"data.chat_template: {PLAIN}, or the path of a Jinja file"
            raise DataError(f"{base} has no chat template", hint=hint)
        if "strftime_now" in own:
            logger.warning("the chat template of %s puts the day it is rendered on into conversations", base)
        return ChatTemplate(own, f"the chat template of {base}")
    if given == PLAIN:
        begins, _ = find_special_tokens(tokenizer)
        bos = "{{ bos_token }}" if begins and begins[0] == tokenizer.bos_token_id else ""
        return ChatTemplate(bos + _PLAIN_TEXT, "the plain chat template")
    if "{{" in given or "{%" in given:
        return ChatTemplate(given, "the chat template of the recipe")
    return ChatTemplate(_read_template(Path(given)), f"the chat template {given}")


def _split_exchanges(messages: Sequence[Message]) -> list[list[Message]]:
    """Questions with the answers to them; questions without an answer at the end are left out, they carry no loss."""
    found: list[list[Message]] = []
    for place, message in enumerate(messages):
        if not found or (message[0] == "user" and messages[place - 1][0] == "assistant"):
            found.append([])
        found[-1].append(message)
    return found if found[-1][-1][0] == "assistant" else found[:-1]


class ChatEncoder:
    """Conversations as samples of at most `max_length` tokens, each answer with its loss in exactly one of them.

    A conversation that is too long is taken apart between exchanges: each sample begins with the system's message and
    holds as many of the exchanges before its last one as fit. Where a single exchange is too long, the longest of its
    questions loses its beginning. An answer is never cut.

    Raises:
        DataError: on construction, if the template does not end answers.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate, *, max_length: int) -> None:
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self._end = template.end(tokenizer)

    def samples(self, messages: Sequence[Message]) -> tuple[int, list[Sample]]:
        """The tokens that the whole conversation has up to its last answer, and its samples.

        Raises:
            RowError: an answer is too long, or the template does not take the conversation.
        """
        try:
            whole = self._sample(messages)
            parts = [whole] if len(whole[0]) <= self.max_length else self._parts(messages)
        except DataError as error:
            raise RowError(error.message) from None
        return len(whole[0]), parts

    def _parts(self, messages: Sequence[Message]) -> list[Sample]:
        """From the end to the beginning: as many exchanges as fit, and so on before them."""
        system = messages[:1] if messages[0][0] == "system" else messages[:0]
        exchanges = _split_exchanges(messages[len(system) :])
        parts: list[Sample] = []

        def since(start: int) -> Sample:
            return self._sample([*system, *(message for exchange in exchanges[start:] for message in exchange)])

        while exchanges:
            places = range(len(exchanges))
            start = bisect_left(places, True, key=lambda place: len(since(place)[0]) <= self.max_length)
            if start < len(exchanges):
                parts.insert(0, since(start))
            else:
                start = len(exchanges) - 1
                parts.insert(0, self._shorten_question([*system, *exchanges[start]]))
            del exchanges[start:]
        return parts

    def _sample(self, messages: Sequence[Message]) -> Sample:
        ids: list[int] = []
        learned: list[bool] = []
        for text, answer in self._pieces(messages):
            piece = tokenize_text(self.tokenizer, text)
            # What a template puts after the end of an answer (a line break, often) is never generated.
            until = len(piece) - piece[::-1].index(self._end) if answer and self._end in piece else 0
            if answer and not until:
                raise DataError(f"{self.template.name} does not end every answer as it ends the first")
            ids += piece
            learned += [True] * until + [False] * (len(piece) - until)
        last = len(learned) - learned[::-1].index(True)  # nothing after it carries a loss
        return ids[:last], learned[:last]

    def _pieces(self, messages: Sequence[Message]) -> Iterator[tuple[str, bool]]:
        """The rendered conversation in pieces, and which of them are answers."""
        whole, place = self.template.told(self.tokenizer, messages), 0
        for number, (role, _) in enumerate(messages):
            if role != "assistant":
                continue
            before = self.template.asked(self.tokenizer, messages[:number])
            through = self.template.told(self.tokenizer, messages[: number + 1])
            if not (whole.startswith(through) and through.startswith(before) and place < len(before)):
                told = f"{self.template.name} renders a conversation differently once it goes on after message {number}"
                raise DataError(told, hint="answers could not be told from the rest")
            yield whole[place : len(before)], False
            yield whole[len(before) : len(through)], True
            place = len(through)

    def _shorten_question(self, messages: Sequence[Message]) -> Sample:
        """One exchange without the beginning of its longest question.

        Raises:
            RowError: it is too long even so.
        """
        questions = [place for place, (role, _) in enumerate(messages) if role == "user"]
        longest = max(questions, key=lambda place: len(messages[place][1]), default=0)
        question = messages[longest][1]

        def without(taken: int) -> Sample:
            return self._sample([*messages[:longest], ("user", question[taken:]), *messages[longest + 1 :]])

        # A character less of the question is never a token more of the sample, or hardly ever: what fits is looked at.
        places = range(len(question) if questions else 0)
        taken = bisect_left(places, True, key=lambda place: len(without(place)[0]) <= self.max_length)
        if taken < len(places) and len((sample := without(taken))[0]) <= self.max_length:
            return sample
        sample = self._sample(messages)
        answers = sum(sample[1])
        raise RowError(
            f"the answer has {answers} tokens, what stands around it {len(sample[0]) - answers}, and max_length is "
            f"{self.max_length}",
            kind=LONG,
        )


def _special_ids_of(tokenizer: Any) -> set[int]:
    """Tokens that are no text: those with a role, and those that were added as special (`<|end|>`)."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
    return special - {tokenizer.unk_token_id}


def _read_template(path: Path) -> str:
    try:
        if not path.is_file():
            hint = f"{PLAIN}, the path of a Jinja file, or a template itself"
            raise DataError(f"chat_template {str(path)!r}: no such file", hint=hint)
        with path.open("rb") as file:
            text = file.read(_MAX_TEMPLATE_BYTES + 1).decode("utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"chat_template {str(path)!r} cannot be read: {error}") from None
    if len(text) > _MAX_TEMPLATE_BYTES or not ("{{" in text or "{%" in text):
        raise DataError(f"{path} is not a chat template", hint="it is a Jinja template, of 1 MB at the most")
    return text
