"""Conversations as tokens: the chat template renders them, and the loss is on what the assistant says.

Where an answer begins and ends is found by rendering the conversation up to it and through it. Both must be a prefix of
the whole conversation as rendered, so that training sees what generation will see; a template that breaks this rule
(some remove earlier thoughts) is rejected. An answer is learned with the token that ends it.

The template decides about the BOS: nothing is added to what it renders, in training or in generation.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_kit.data.cells import RowError
from lora_kit.data.layouts import Message, get_reasoning, is_learned_answer
from lora_kit.data.records import LONG
from lora_kit.errors import DataError
from lora_kit.models.prompt_tokens import find_special_tokens, tokenize_text
from lora_kit.models.protocols import Tokenizer

logger = logging.getLogger(__name__)

PLAIN: Final = "plain"
"""The name of the template of this package."""
_PLAIN_TEMPLATE: Final = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    # transformers' Jinja removes a line break after a block, but not one in an expression.
    "{{ eos_token if message['role'] == 'assistant' }}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
_MAX_TEMPLATE_BYTES: Final = 2**20

Sample = tuple[list[int], list[bool]]
"""Tokens, and whether there is a loss on each."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, rendered in the sandbox of transformers.

    Attributes:
        text: the template itself.
        name: how errors call it.
    """

    text: str
    name: str

    def render_prompt(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
        """Render a conversation and the beginning of the next answer, which generation continues.

        Raises:
            DataError: the template rejects this conversation.
        """
        return self._render(tokenizer, messages, add_generation_prompt=True)

    def render(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
        """Render a conversation; raises as `render_prompt` does."""
        return self._render(tokenizer, messages, add_generation_prompt=False)

    def _render(self, tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        conversation = [_describe_message(message) for message in messages]
        try:
            text = tokenizer.apply_chat_template(
                conversation, chat_template=self.text, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template may raise anything
            raise DataError(f"{self.name}: {' '.join(str(error).split())}") from None
        return str(text)

    def find_end_token(self, tokenizer: Tokenizer) -> int:
        """Return the token that ends an answer.

        Raises:
            DataError: the template puts no special token after an answer, so a model could not learn where to end.
        """
        text = self.render(tokenizer, [("user", "a"), ("assistant", "b")]).rstrip()
        names = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in _find_special_ids(tokenizer)}
        ends = [token for token, name in names.items() if text.endswith(name)]
        if not ends:
            hint = "an answer ends with {{ eos_token }} or with another special token of the tokenizer"
            raise DataError(f"{self.name} puts no special token after an answer", hint=hint)
        return max(ends, key=lambda token: len(names[token]))


def _describe_message(message: Message) -> dict[str, str]:
    """Return a message as templates read it; they call what the assistant thought by either of two names."""
    role, content = message
    reasoning = get_reasoning(message)
    thoughts = {"reasoning_content": reasoning, "thinking": reasoning} if reasoning else {}
    return {"role": role, "content": content, **thoughts}


def find_chat_template(tokenizer: Tokenizer) -> str | None:
    """Return the default chat template of a tokenizer, or None if it has none."""
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def chat_template(given: str | None, tokenizer: Tokenizer, *, base: str) -> ChatTemplate:
    """Return the requested template.

    Args:
        given: None for the tokenizer's own, `plain`, the text of a template (it contains `{{` or `{%`), or its file.
        base: the name of the tokenizer's model.

    Raises:
        DataError: the template does not exist, or cannot be read.
    """
    if given is None:
        own = find_chat_template(tokenizer)
        if not own:
            hint = f"data.chat_template: {PLAIN}, or the path of a Jinja file"
            raise DataError(f"{base} has no chat template", hint=hint)
        if "strftime_now" in own:
            logger.warning("the chat template of %s writes the current date into every conversation", base)
        return ChatTemplate(own, f"the chat template of {base}")
    if given == PLAIN:
        prefix, _ = find_special_tokens(tokenizer)
        bos = "{{ bos_token }}" if prefix and prefix[0] == tokenizer.bos_token_id else ""
        return ChatTemplate(bos + _PLAIN_TEMPLATE, "the plain chat template")
    if _is_template(given):
        return ChatTemplate(given, "the chat template of the recipe")
    return ChatTemplate(_read_template(Path(given)), f"the chat template {given}")


def _is_template(text: str) -> bool:
    return "{{" in text or "{%" in text


def _split_exchanges(messages: Sequence[Message]) -> list[list[Message]]:
    """Split a conversation into questions with their answers; drop what follows the last answer that is learned."""
    exchanges: list[list[Message]] = []
    previous_role = ""
    for message in messages:
        if not exchanges or (message[0] == "user" and previous_role == "assistant"):
            exchanges.append([])
        exchanges[-1].append(message)
        previous_role = message[0]
    return _drop_unlearned_end(exchanges)


def _drop_unlearned_end(exchanges: list[list[Message]]) -> list[list[Message]]:
    """Return exchanges without the last ones of which no answer is learned."""
    learned = [index for index, exchange in enumerate(exchanges) if any(map(is_learned_answer, exchange))]
    return exchanges[: learned[-1] + 1] if learned else []


class ChatEncoder:
    """Encodes conversations as samples of at most `max_length` tokens; each answer has its loss in exactly one of them.

    A conversation that is too long is split between exchanges: each sample begins with the system's message and holds
    as many of the exchanges before its last one as fit. If a single exchange is too long, its longest question loses
    its beginning. An answer is never cut.

    Raises:
        DataError: on construction, if the template does not end answers.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, *, max_length: int) -> None:
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self._end = template.find_end_token(tokenizer)

    def encode(self, messages: Sequence[Message]) -> tuple[int, list[Sample]]:
        """Return how many tokens the conversation has up to its last answer, and its samples.

        Raises:
            RowError: an answer is too long, or the template rejects the conversation.
        """
        try:
            whole = self._encode_whole(messages)
            samples = [whole] if self._fits(whole) else self._encode_split(messages)
        except DataError as error:
            raise RowError(error.message) from None
        return len(whole[0]), samples

    def _fits(self, sample: Sample) -> bool:
        return len(sample[0]) <= self.max_length

    def _encode_split(self, messages: Sequence[Message]) -> list[Sample]:
        """Fill samples from the last exchange backwards, each with as many exchanges as fit."""
        system = messages[:1] if messages[0][0] == "system" else messages[:0]
        exchanges = _split_exchanges(messages[len(system) :])
        samples: list[Sample] = []

        def encode_from(start: int) -> Sample:
            return self._encode_whole([*system, *(message for exchange in exchanges[start:] for message in exchange)])

        while exchanges:
            start = bisect_left(range(len(exchanges)), True, key=lambda index: self._fits(encode_from(index)))
            if start < len(exchanges):
                samples.insert(0, encode_from(start))
            else:
                start = len(exchanges) - 1
                samples.insert(0, self._encode_shortened([*system, *exchanges[start]]))
            exchanges = _drop_unlearned_end(exchanges[:start])
        return samples

    def _encode_whole(self, messages: Sequence[Message]) -> Sample:
        """Encode a conversation up to its last learned answer; nothing after that carries a loss."""
        ids: list[int] = []
        loss_mask: list[bool] = []
        for text, is_learned in self._render_pieces(messages):
            piece = tokenize_text(self.tokenizer, text)
            # What a template puts after the end of an answer (a line break, often) is never generated.
            learned = len(piece) - piece[::-1].index(self._end) if is_learned and self._end in piece else 0
            if is_learned and not learned:
                raise DataError(f"{self.template.name} does not end every answer as it ends the first")
            ids += piece
            loss_mask += [True] * learned + [False] * (len(piece) - learned)
        length = len(loss_mask) - loss_mask[::-1].index(True)
        return ids[:length], loss_mask[:length]

    def _render_pieces(self, messages: Sequence[Message]) -> Iterator[tuple[str, bool]]:
        """Yield the rendered conversation in pieces, and whether each is an answer that is learned."""
        whole, position = self.template.render(self.tokenizer, messages), 0
        for number, message in enumerate(messages):
            if not is_learned_answer(message):
                if get_reasoning(message).strip() not in whole:
                    raise self._build_lost_reasoning_error(number)
                continue
            before = self.template.render_prompt(self.tokenizer, messages[:number])
            through = self.template.render(self.tokenizer, messages[: number + 1])
            if not (whole.startswith(through) and through.startswith(before) and position < len(before)):
                what = f"{self.template.name} renders a conversation differently once it goes on after message"
                raise DataError(f"{what} {number}", hint="the answers in it cannot be located")
            if get_reasoning(message).strip() not in whole[len(before) : len(through)]:
                raise self._build_lost_reasoning_error(number)
            yield whole[position : len(before)], False
            yield whole[len(before) : len(through)], True
            position = len(through)

    def _build_lost_reasoning_error(self, number: int) -> DataError:
        what = f"{self.template.name} does not render the reasoning of message {number + 1}"
        return DataError(f"{what}, which would be lost")

    def _encode_shortened(self, messages: Sequence[Message]) -> Sample:
        """Encode one exchange without the beginning of its longest question."""
        questions = [index for index, (role, _) in enumerate(messages) if role == "user"]
        longest = max(questions, key=lambda index: len(messages[index][1]), default=0)
        question = messages[longest][1]

        def encode_without(cut: int) -> Sample:
            return self._encode_whole([*messages[:longest], ("user", question[cut:]), *messages[longest + 1 :]])

        # Removing a character hardly ever adds a token; where it does, the search may end at one that does not fit.
        cuts = range(len(question) if questions else 0)
        cut = bisect_left(cuts, True, key=lambda cut: self._fits(encode_without(cut)))
        if cut < len(cuts) and self._fits(sample := encode_without(cut)):
            return sample
        sample = self._encode_whole(messages)
        answer_length = sum(sample[1])
        raise RowError(
            f"the answer has {answer_length} tokens, the text around it {len(sample[0]) - answer_length}, "
            f"and max_length is {self.max_length}",
            kind=LONG,
        )


def _find_special_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the tokens that are not text: those with a role, and those that were added as special (`<|end|>`)."""
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
    if len(text) > _MAX_TEMPLATE_BYTES or not _is_template(text):
        raise DataError(f"{path} is not a chat template", hint="it is a Jinja template, of at most 1 MB")
    return text
