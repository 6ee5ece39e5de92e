"""Conversations as samples: each is rendered once and tokenized once, and the loss is on what the assistant says.

A sample is a conversation through one of its answers, exactly as generation has it when that answer is written. Earlier
answers in it are learned, too, as long as the template still renders them as they were written; one that it shortens
later on (some take thoughts out again) gets a sample of its own, in which it stands last.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from lora_kit.data.answer_ends import find_answer_ends
from lora_kit.data.answer_tokens import encode_answers
from lora_kit.data.answers import Answer, locate_answer
from lora_kit.data.cells import RowError
from lora_kit.data.messages import ALL, INSTRUCTIONS, Conversation, find_learned_answers
from lora_kit.data.records import LONG
from lora_kit.data.rendered_checks import check_context
from lora_kit.data.templates import ChatTemplate
from lora_kit.errors import DataError
from lora_kit.models.protocols import Tokenizer


@dataclass(frozen=True)
class ChatSample:
    """Tokens of a conversation, and on which of them there is a loss.

    Attributes:
        ids: the tokens.
        loss_mask: whether there is a loss on each.
        learned: indices in the whole conversation of the answers that are learned here; the last one ends the sample.
        conversation: what was rendered.
    """

    ids: list[int]
    loss_mask: list[bool]
    learned: tuple[int, ...]
    conversation: Conversation


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as samples.

    Attributes:
        length: tokens up to its last answer, before anything was cut.
        samples: in the order of their last answers; each answer has its loss in exactly one of them.
        is_cut: whether the conversation was too long for one sample.
        is_divided: whether answers have samples of their own because the template renders them differently later on.
    """

    length: int
    samples: list[ChatSample]
    is_cut: bool
    is_divided: bool


class ChatEncoder:
    """Encodes conversations as samples of at most `max_length` tokens; each answer has its loss in exactly one of them.

    A conversation that is too long is split between exchanges: each sample begins with the instructions and holds as
    many of the exchanges before its last answer as fit. If a single exchange is too long, its longest question loses
    its beginning. An answer is never cut.

    Args:
        learn: which answers are learned; see `lora_kit.data.messages.LEARN`.

    Raises:
        DataError: on construction, if the template does not end answers.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, *, max_length: int, learn: str = ALL) -> None:
        self.tokenizer, self.template, self.max_length, self.learn = tokenizer, template, max_length, learn
        find_answer_ends(template, tokenizer)

    def encode(self, conversation: Conversation) -> EncodedConversation:
        """Encode a conversation.

        Raises:
            RowError: an answer is too long, none is to be learned, or the template does not render the conversation so
                that generation could write its answers.
        """
        learned = find_learned_answers(conversation, self.learn)
        if not learned:
            raise RowError(f"learn: {self.learn} leaves no answer of this conversation to learn")
        try:
            return self._encode_answers(conversation, learned)
        except DataError as error:
            raise RowError(error.message) from None

    def _encode_answers(self, conversation: Conversation, learned: Sequence[int]) -> EncodedConversation:
        """Build samples from the last answer backwards, each with as many earlier answers as can be learned in it."""
        builder = _SampleBuilder(self.tokenizer, self.template, conversation)
        samples: list[ChatSample] = []
        remaining, length, is_cut, is_divided = list(learned), 0, False, False
        while remaining:
            sample = builder.build(0, remaining)
            length = max(length, len(sample.ids))
            if len(sample.ids) > self.max_length:
                sample, is_cut = self._cut_sample(builder, remaining), True
            elif len(sample.learned) < len(remaining):
                is_divided = True
            samples.insert(0, sample)
            remaining = [index for index in remaining if index not in sample.learned]
        return EncodedConversation(length, samples, is_cut, is_divided)

    def _cut_sample(self, builder: _SampleBuilder, learned: Sequence[int]) -> ChatSample:
        """Return a sample of as many exchanges before the last answer as fit."""
        last = learned[-1]
        starts = [start for start in builder.exchange_starts if start < last]

        def fits(start: int) -> bool:
            return len(builder.build(start, [last]).ids) <= self.max_length

        place = bisect_left(starts, True, key=fits)
        start = starts[min(place, len(starts) - 1)]
        inside = [index for index in learned if index >= start]
        if place < len(starts):
            return builder.build(start, inside)
        return self._shorten_question(builder, start, inside)

    def _shorten_question(self, builder: _SampleBuilder, start: int, learned: Sequence[int]) -> ChatSample:
        """Return one exchange without the beginning of its longest question."""
        messages = builder.conversation.messages
        questions = [index for index in range(start, learned[-1]) if messages[index].role == "user"]
        longest = max(questions, key=lambda index: len(messages[index].content), default=0)
        content = messages[longest].content

        def build_without(cut: int) -> ChatSample:
            return builder.with_content(longest, content[cut:]).build(start, learned)

        # Removing a character hardly ever adds a token; where it does, the search may end at one that does not fit.
        cuts = range(len(content) if questions else 0)
        cut = bisect_left(cuts, True, key=lambda cut: len(build_without(cut).ids) <= self.max_length)
        if cut < len(cuts) and len((sample := build_without(cut)).ids) <= self.max_length:
            return sample
        sample = builder.build(start, learned)
        answer_length = sum(sample.loss_mask)
        raise RowError(
            f"the answer has {answer_length} tokens, the text around it {len(sample.ids) - answer_length}, "
            f"and max_length is {self.max_length}",
            kind=LONG,
        )


class _SampleBuilder:
    """Builds samples of one conversation; rendered answers are kept, for several samples may begin alike."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, conversation: Conversation) -> None:
        self.conversation = conversation
        self._tokenizer, self._template = tokenizer, template
        self._located: dict[tuple[int, int], Answer] = {}
        roles = [message.role for message in conversation.messages]
        self._head = next((index for index, role in enumerate(roles) if role not in INSTRUCTIONS), 0)
        body = range(self._head, len(roles))
        self.exchange_starts = [
            index
            for index in body
            if index == self._head or (roles[index] == "user" and roles[index - 1] in ("assistant", "tool"))
        ]

    def with_content(self, index: int, content: str) -> _SampleBuilder:
        """Return a builder of the conversation with another text in one message."""
        messages = list(self.conversation.messages)
        messages[index] = dataclasses.replace(messages[index], content=content)
        return _SampleBuilder(self._tokenizer, self._template, self.conversation.with_messages(tuple(messages)))

    def build(self, start: int, learned: Sequence[int]) -> ChatSample:
        """Encode the instructions and the messages from `start` through the last of the answers.

        Every other answer that can be learned there is learned, too.

        Args:
            learned: indices of answers in the whole conversation.
        """
        skipped = max(0, start - self._head)
        messages = self.conversation.messages
        part = self.conversation.with_messages(
            (*messages[: self._head], *messages[self._head + skipped : learned[-1] + 1])
        )
        answers = [self._locate(part, skipped, index) for index in learned]
        check_context(self._template, self._tokenizer, part, answers[-1].through)
        ids, loss_mask, kept = encode_answers(self._tokenizer, answers)
        indices = tuple(index for index, answer in zip(learned, answers, strict=True) if answer in kept)
        return ChatSample(ids, loss_mask, indices, part)

    def _locate(self, part: Conversation, skipped: int, index: int) -> Answer:
        key = (skipped, index)
        if key not in self._located:
            self._located[key] = locate_answer(self._template, self._tokenizer, part, index - skipped)
        return self._located[key]
