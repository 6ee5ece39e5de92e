"""Requests on their way into an engine, what may wait, and what has happened."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lora_kit.adapter.adapter import Adapter
from lora_kit.bank.routes import Lease
from lora_kit.errors import LoraKitError
from lora_kit.serving.engine import EngineRequest, Event, Wanted
from lora_kit.serving.sampler import SamplingSettings

Sink = Callable[[Event], None]
"""Receives the events of a request, in the worker's thread; it must not block."""


class OverloadedError(LoraKitError, RuntimeError):
    """The server takes no more requests at the moment."""


@dataclass(frozen=True, kw_only=True)
class QueueLimits:
    """What may wait.

    Attributes:
        requests: that have not begun, at most.
        tokens: of their prompts and answers, at most.
        seconds: that a request may wait before it begins.
    """

    requests: int = 256
    tokens: int = 1_000_000
    seconds: float = 60.0


@dataclass(frozen=True)
class Ticket:
    """A request on its way into the engine.

    Attributes:
        request_id: no two at a time have one.
        prompt: token ids.
        settings: how tokens are chosen.
        adapter: the content that answers; None for the base.
        end_tokens: that end the answer.
        sink: receives its events.
        wanted: tokens, or what one forward gives.
        token_types: of two texts; see `EngineRequest`.
        arrived: time, by the monotonic clock.
    """

    request_id: str
    prompt: tuple[int, ...]
    settings: SamplingSettings
    adapter: Adapter | None
    end_tokens: frozenset[int]
    sink: Sink
    wanted: Wanted = "tokens"
    token_types: tuple[int, ...] = ()
    arrived: float = field(default_factory=time.monotonic)

    @property
    def tokens(self) -> int:
        return len(self.prompt) + self.settings.max_tokens

    def make_request(self, lease: Lease | None) -> EngineRequest:
        """Return what the engine gets; the lease is of the adapter, None for the base."""
        return EngineRequest(
            self.request_id,
            self.prompt,
            self.settings,
            lease,
            self.end_tokens,
            wanted=self.wanted,
            token_types=self.token_types,
        )


@dataclass
class WorkerCounts:
    """What happened since the worker began.

    Attributes:
        requests: taken.
        finished: by reason.
        prompt_tokens: of finished requests.
        reused_tokens: of these, whose keys and values were there.
        new_tokens: chosen.
        steps: of the engine.
    """

    requests: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
