"""A request that has a row, and what the keys and values of a row were computed from."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_kit.generation.text_stream import TextStream
from lora_kit.serving.engine import EngineRequest, Finish, FinishReason
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
        row: of its keys and values.
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

    def finish(self, reason: FinishReason, message: str = "") -> Finish:
        return Finish(reason, len(self.request.prompt), self.reused, len(self.answer), message)
