"""A request that has a row, and what the keys and values of a row were computed from."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lora_kit.generation.text_stream import TextStream
from lora_kit.serving.engine import EngineRequest, Event, Finish, FinishReason
from lora_kit.serving.sampler import Sampler


@dataclass
class RowContent:
    """What the keys and values of a row were computed from.

    Attributes:
        content: digest of the adapter, empty for the base.
        tokens: whose keys and values are there, from position 0.
    """

    content: str = ""
    tokens: list[int] = field(default_factory=list)


@dataclass
class RunningRequest:
    """A request with a row.

    Attributes:
        row: of its keys and values, or of its batch.
        read: tokens of the prompt whose keys and values are there.
        reused: of these, how many were there when it began.
        answer: its tokens so far.
    """

    request: EngineRequest
    sampler: Sampler
    stream: TextStream
    row: int
    read: int
    reused: int
    answer: list[int] = field(default_factory=list)

    @property
    def is_generating(self) -> bool:
        return self.read == len(self.request.prompt)

    @property
    def position(self) -> int:
        """Of its newest token."""
        return len(self.request.prompt) + len(self.answer) - 1

    def choose(self, logits: Tensor) -> Event:
        """Choose its next token from the logits, (vocabulary,), and return what came of it.

        Logits that are not finite, or that cannot be sampled from, end it.
        """
        try:
            chosen = self.sampler.choose(logits)
        except (ValueError, RuntimeError) as error:
            return self.end("error", str(error))
        settings = self.request.settings
        self.answer.append(chosen.token)
        is_end = chosen.token in self.request.end_tokens and not settings.ignore_eos
        text = "" if is_end else self.stream.push(chosen.token)
        if is_end or self.stream.stopped or len(self.answer) == settings.max_tokens:
            text += self.stream.finish()
            reason: FinishReason = "stop" if is_end or self.stream.stopped else "length"
            return Event(self.request.request_id, text, chosen, self._finish(reason))
        return Event(self.request.request_id, text, chosen)

    def end(self, reason: FinishReason, message: str = "") -> Event:
        """Return the event that ends it before its time."""
        return Event(self.request.request_id, self.stream.finish(), finish=self._finish(reason, message))

    def _finish(self, reason: FinishReason, message: str = "") -> Finish:
        return Finish(reason, len(self.request.prompt), self.reused, len(self.answer), message)
