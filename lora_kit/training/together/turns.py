"""A piece of work in a thread of its own that runs only while it is its turn, so that many share one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

from lora_kit.training.together.process_state import TurnState

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Result = TypeVar("Result")


class WorkAbandonedError(BaseException):
    """Raised in the work where it waits, so that it cleans up and ends."""


class TurnThread(Generic[Request, Answer, Result]):
    """Work that asks for something now and then, and continues with the answer.

    Exactly one of the work and its driver runs at any time. The random states and accelerate's shared states that the
    work leaves when it waits are those that it finds when it continues.

    Args:
        name: of the thread.
        work: is called with the function by which it asks; its result ends it.

    Attributes:
        state: of the process, as the work left it when it last waited.
        request: what it waits for; None once it has ended.
        result: of the work; None until it has ended, or where it failed.
        error: that ended it; None where none did.
    """

    def __init__(self, name: str, work: Callable[[Callable[[Request], Answer]], Result]) -> None:
        self.state = TurnState.capture()
        self.request: Request | None = None
        self.result: Result | None = None
        self.error: BaseException | None = None
        self._work = work
        self._answers: SimpleQueue[Answer | BaseException | None] = SimpleQueue()
        self._pauses: SimpleQueue[None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._is_running = False

    @property
    def has_ended(self) -> bool:
        """Whether the work is over."""
        return self._thread.ident is not None and not self._is_running and self.request is None

    def resume(self, answer: Answer | BaseException | None = None) -> None:
        """Let the work begin, or continue with an answer, until it asks again or ends.

        Args:
            answer: to what it asked; an error is raised where it asked.
        """
        self._hand_over(answer)

    def abandon(self) -> None:
        """End the work where it waits; one that is running, since its driver was interrupted, at its next wait."""
        if self._thread.ident is None or self.has_ended:
            return
        if self._is_running:
            self._pauses.get()
            self._is_running = False
        while not self.has_ended:
            self._hand_over(WorkAbandonedError())

    def _hand_over(self, answer: Answer | BaseException | None) -> None:
        self.state.restore()
        self.request, self._is_running = None, True
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._answers.put(answer)
        self._pauses.get()
        self._is_running = False

    def _run(self) -> None:
        try:
            self.result = self._work(self._ask)
        except BaseException as error:  # whatever it is, its driver decides
            self.error = error
        self.request = None
        self._pauses.put(None)

    def _ask(self, request: Request) -> Answer:
        self.state = TurnState.capture()
        self.request = request
        self._pauses.put(None)
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer  # type: ignore[return-value]  # None begins the work and answers nothing
