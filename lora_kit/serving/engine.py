"""What an engine takes, what it gives, and the interface of both engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from lora_kit.bank.routes import Lease
from lora_kit.errors import LoraKitError
from lora_kit.serving.sampler import ChosenToken, SamplingSettings

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""An end token or a stop text; `max_tokens`; the client; a failure."""
Wanted = Literal["tokens", "scores", "embedding"]
"""Tokens that continue the prompt; the scores of the head's labels; the mean of the last layer's hidden states."""


class RequestError(LoraKitError, ValueError):
    """A request that can never run.

    Attributes:
        code: what is wrong, in a word for programs.
        field: of the request; None where it is not one field.
    """

    def __init__(self, message: str, *, code: str, field: str | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.field = field


@dataclass(frozen=True)
class EngineRequest:
    """A prompt to be continued.

    Attributes:
        request_id: no two requests in an engine have one.
        prompt: token ids, at least one.
        settings: how its tokens are chosen.
        lease: keeps the adapter in its slot; None for the base.
        end_tokens: tokens that end the answer.
        wanted: what is asked for.
        token_types: of two texts, which one each token of the prompt belongs to; empty for one text.
    """

    request_id: str
    prompt: Sequence[int]
    settings: SamplingSettings
    lease: Lease | None = None
    end_tokens: frozenset[int] = frozenset()
    wanted: Wanted = "tokens"
    token_types: Sequence[int] = ()

    @property
    def content(self) -> str:
        """What computes its keys and values: the adapter's digest, empty for the base."""
        return "" if self.lease is None else self.lease.digest


@dataclass(frozen=True)
class Finish:
    """How a request ended.

    Attributes:
        reason: why.
        prompt_tokens: of the prompt.
        reused_tokens: of the prompt, whose keys and values were there already.
        new_tokens: of the answer, an end token among them.
        message: what failed.
        error: where a request was turned away while it waited, why; None where its forward failed.
    """

    reason: FinishReason
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    message: str = ""
    error: LoraKitError | None = None


@dataclass(frozen=True)
class Event:
    """What came of a request in a step.

    Attributes:
        request_id: of the request.
        text: what the answer's text grew by.
        chosen: the new token; None where the event only ends the request.
        finish: how it ended; None while it goes on.
        values: scores before any softmax, or an embedding; empty where tokens are asked for.
    """

    request_id: str
    text: str = ""
    chosen: ChosenToken | None = None
    finish: Finish | None = None
    values: Sequence[float] = ()


class Engine(Protocol):
    """Runs requests, step by step. One thread owns it, the bank and the model."""

    @property
    def needs_runs(self) -> bool:
        """Whether every adapter must tell the tokens of a packed forward apart."""

    @property
    def positions(self) -> int:
        """Tokens of a prompt, at most; an answer may count, too: see `count_left`."""

    @property
    def busy_contents(self) -> frozenset[str]:
        """Adapters of rows that have ended, and are still computed until their batch ends."""

    def count_left(self, prompt_tokens: int) -> int:
        """Return how many tokens an answer to so long a prompt can have."""

    def measure_effect(self, lease: Lease) -> float:
        """Return the largest change of an output by an adapter, over a few tokens spread over the vocabulary."""

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""

    @property
    def running(self) -> int:
        """Requests that have."""

    def submit(self, request: EngineRequest) -> None:
        """Take a request.

        Raises:
            RequestError: it can never run.
        """

    def cancel(self, request_id: str) -> None:
        """End a request with the next step; nothing happens for one that is not there any more."""

    def step(self) -> list[Event]:
        """Compute what is next of the requests that run; return at once, with nothing, where there are none."""

    def close(self) -> None:
        """Give the model back as it was."""
