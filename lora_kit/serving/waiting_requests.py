"""Requests that have not begun: adapters take turns, requests of one adapter come in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable

from lora_kit.serving.engine import EngineRequest, Event, Finish, RequestError, Wanted
from lora_kit.serving.fair_turns import FairTurns


class WaitingRequests:
    """The queue of an engine."""

    def __init__(self) -> None:
        self._requests = dict[str, EngineRequest]()
        self._turns = FairTurns()

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._requests

    def add(self, request: EngineRequest) -> None:
        """Take a request in.

        Raises:
            RequestError: one with its id waits.
        """
        if request.request_id in self._requests:
            raise make_duplicate_error(request.request_id)
        self._requests[request.request_id] = request

    def cancel(self, request_id: str) -> Event | None:
        """Take a request out, and return the event that ends it; None where it does not wait."""
        request = self._requests.pop(request_id, None)
        return None if request is None else Event(request_id, finish=Finish("cancelled", len(request.prompt), 0, 0))

    def take(self, count: int, *, group: Callable[[EngineRequest], Hashable] | None = None) -> list[EngineRequest]:
        """Take out at most so many requests.

        Args:
            group: only requests for which it gives what it gives for the one that came first.
        """
        if not self._requests or count <= 0:
            return []
        first = next(iter(self._requests.values()))
        by_content, taken = dict[Hashable, deque[EngineRequest]](), list[EngineRequest]()
        for request in self._requests.values():
            if group is None or group(request) == group(first):
                by_content.setdefault(request.content, deque()).append(request)

        def take_some(content: Hashable, most: int) -> int:
            chosen = [by_content[content].popleft() for _ in range(min(most, len(by_content[content])))]
            taken.extend(chosen)
            return len(chosen)

        self._turns.divide(count, by_content, take_some)
        for request in taken:
            del self._requests[request.request_id]
        return taken


def make_duplicate_error(request_id: str) -> RequestError:
    """Return the error for a request whose id is in use."""
    return RequestError(f"the id {request_id!r} is in use", code="duplicate_id")


def make_length_error(prompt_tokens: int, new_tokens: int, most: int) -> RequestError:
    """Return the error for a request that is longer than the engine's context."""
    asked = f" and max_tokens is {new_tokens:,}; together they can be" if new_tokens else "; there can be"
    return RequestError(
        f"the prompt has {prompt_tokens:,} tokens{asked} {most:,}",
        code="context_length_exceeded",
        field="max_tokens" if new_tokens else "input",
        hint="shorten the prompt or ask for fewer tokens" if new_tokens else "shorten the text",
    )


def check_wanted(request: EngineRequest, *known: Wanted) -> None:
    """Check that an engine computes what a request asks for.

    Raises:
        RequestError: it does not.
    """
    if request.wanted not in known:
        message = f"this base computes {' and '.join(known)}, not {request.wanted}"
        raise RequestError(message, code="unsupported", field="model", hint="serve a base of another task")


def check_vocabulary(request: EngineRequest, *, vocabulary: int) -> None:
    """Check the tokens of a request.

    Raises:
        RequestError: there are none, or one is not in the vocabulary.
    """
    if not request.prompt:
        raise RequestError("the prompt has no token", code="empty_prompt", field="prompt")
    wrong = next((token for token in request.prompt if not 0 <= token < vocabulary), None)
    if wrong is not None:
        message = f"{wrong} is not a token of this base; they are 0 to {vocabulary - 1:,}"
        raise RequestError(message, code="invalid_token", field="prompt")
    biased = next((token for token in request.settings.logit_bias if not 0 <= token < vocabulary), None)
    if biased is not None:
        raise RequestError(f"logit_bias: {biased} is not a token", code="invalid_token", field="logit_bias")
