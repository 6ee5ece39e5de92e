"""The thread that owns model, bank and engine: requests, loads and cancels are commands between its steps."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, TypeVar

from lora_kit.bank.routes import Lease
from lora_kit.errors import LoraKitError
from lora_kit.serving.adapter_slots import AdapterSlots, NoFreeSlotError
from lora_kit.serving.engine import Engine, Event, Finish, RequestError
from lora_kit.serving.tickets import OverloadedError, QueueLimits, Ticket, WorkerCounts

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
_IDLE_SECONDS: Final = 0.5
"""How long an idle worker waits for a command before it looks whether anything is overdue."""
_PATIENCE_SECONDS: Final = 1.0
"""How long a request waits for a slot while later ones, whose adapters are in slots, go first."""


class ModelWorker(threading.Thread):
    """Runs an engine until it is stopped.

    Attributes:
        slots: the adapters.
        counts: what happened; other threads may read it.
        limits: what may wait.
    """

    def __init__(self, engine: Engine, slots: AdapterSlots, *, limits: QueueLimits | None = None) -> None:
        super().__init__(name="lora-kit-model", daemon=True)
        self.slots = slots
        self.counts = WorkerCounts()
        self.limits = limits or QueueLimits()
        self._engine = engine
        self._commands = queue.SimpleQueue[Callable[[], None]]()
        self._waiting_for_slot = deque[Ticket]()
        self._tickets = dict[str, Ticket]()
        self._leases = dict[str, Lease]()
        self._begun = set[str]()
        self._stopping, self._has_ended = False, False
        self._busy_since: float | None = None

    # From any thread

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Run a function between two steps, in the worker's thread.

        The future raises OverloadedError if that has ended.
        """
        future = Future[Result]()

        def run() -> None:
            if self._has_ended:
                future.set_exception(OverloadedError("the server ends"))
            elif future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # the caller gets it, whatever it is
                    future.set_exception(error)

        self._commands.put(run)
        if self._has_ended:
            self._run_commands(wait=False)
        return future

    def submit(self, ticket: Ticket) -> Future[None]:
        """Take a request; its events go to its sink.

        The future raises RequestError for one that can never run, and OverloadedError if too much waits.
        """
        return self.call(lambda: self._take(ticket))

    def cancel(self, request_id: str) -> None:
        """End a request; one that has ended is no matter."""
        self._commands.put(lambda: self._cancel(request_id))

    def stop(self) -> None:
        """End the thread after its step; what runs is cancelled."""

        def stop() -> None:
            self._stopping = True

        self._commands.put(stop)

    @property
    def stuck_seconds(self) -> float:
        """How long the present step or command has been taking; 0 where there is none."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._tickets) - len(self._begun)

    @property
    def running(self) -> int:
        """Requests that have begun."""
        return len(self._begun)

    # In its own thread

    def run(self) -> None:
        """Run commands and steps until `stop`."""
        try:
            while not self._stopping:
                self._run_once()
            self._end_all()
            self._engine.close()
        finally:
            self._has_ended = True
            self._run_commands(wait=False)  # those that came too late

    def _run_once(self) -> None:
        self._run_commands(wait=not self._tickets)
        self._busy_since = time.monotonic()
        try:
            self._end_overdue()
            self._admit_waiting()
            for event in self._engine.step():
                self._dispatch(event)
            self.counts.steps += 1
        except Exception as error:  # outside of a forward: nobody knows whose fault it is, so all in the engine end
            logger.exception("a step failed")
            self._fail_running(error)
        finally:
            self._busy_since = None

    def _run_commands(self, *, wait: bool) -> None:
        try:
            command = self._commands.get(timeout=_IDLE_SECONDS) if wait else self._commands.get_nowait()
            while True:
                self._busy_since = time.monotonic()
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            return

    def _take(self, ticket: Ticket) -> None:
        if ticket.request_id in self._tickets:
            raise RequestError(f"the id {ticket.request_id!r} is in use", code="duplicate_id")
        self._check_limits(ticket)
        # The base needs no slot, so it waits for none.
        if (ticket.adapter is not None and self._must_wait()) or not self._begin(ticket):
            self._waiting_for_slot.append(ticket)
        self._tickets[ticket.request_id] = ticket
        self.counts.requests += 1

    def _check_limits(self, ticket: Ticket) -> None:
        waiting = [self._tickets[each] for each in self._tickets.keys() - self._begun]
        if len(waiting) >= self.limits.requests:
            raise OverloadedError(f"{len(waiting):,} requests are waiting", hint="try again later")
        tokens = ticket.tokens + sum(each.tokens for each in waiting)
        if waiting and tokens > self.limits.tokens:
            raise OverloadedError(f"{tokens:,} tokens would be waiting", hint="try again later")

    def _must_wait(self) -> bool:
        """Return whether somebody has waited for a slot for so long that all who come later wait as well.

        Otherwise adapters that are asked for all the time would never leave their slots.
        """
        oldest = self._waiting_for_slot[0] if self._waiting_for_slot else None
        return oldest is not None and time.monotonic() - oldest.arrived > _PATIENCE_SECONDS

    def _begin(self, ticket: Ticket) -> bool:
        """Submit a request to the engine; return whether there was a slot for its adapter."""
        if ticket.adapter is None:
            self._engine.submit(ticket.make_request(None))
            return True
        try:
            lease = self.slots.lease(ticket.adapter)
        except NoFreeSlotError:
            return False
        try:
            self._engine.submit(ticket.make_request(lease))
        except BaseException:
            self.slots.release(lease)
            raise
        self._leases[ticket.request_id] = lease
        return True

    def _admit_waiting(self) -> None:
        """Give slots to those who wait for one, in the order of their arrival."""
        waiting, self._waiting_for_slot = self._waiting_for_slot, deque()
        while waiting:
            ticket = waiting.popleft()
            if self._must_wait():
                self._waiting_for_slot.append(ticket)
                continue
            try:
                if not self._begin(ticket):
                    self._waiting_for_slot.append(ticket)
            except Exception as error:
                if not isinstance(error, LoraKitError):
                    logger.exception("a request could not begin")
                self._fail(ticket, error)

    def _end_overdue(self) -> None:
        """End requests that waited too long."""
        now = time.monotonic()
        for request_id in list(self._tickets.keys() - self._begun):
            ticket = self._tickets[request_id]
            if now - ticket.arrived > self.limits.seconds:
                error = OverloadedError(f"the request waited {self.limits.seconds:g} s", hint="try again later")
                self._drop(ticket)
                self._fail(ticket, error)

    def _drop(self, ticket: Ticket) -> None:
        """Let a request not begin any more, or end with the next step."""
        if ticket in self._waiting_for_slot:
            self._waiting_for_slot.remove(ticket)
        else:
            self._engine.cancel(ticket.request_id)

    def _fail_running(self, error: Exception) -> None:
        waiting = {ticket.request_id for ticket in self._waiting_for_slot}
        for request_id in [each for each in self._tickets if each not in waiting]:
            ticket = self._tickets[request_id]
            self._drop(ticket)
            self._fail(ticket, error)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        own = error if isinstance(error, LoraKitError) else None
        message = str(error) if own else f"{type(error).__name__}: {error}"
        finish = Finish("error", len(ticket.prompt), 0, 0, message, own)
        self._dispatch(Event(ticket.request_id, finish=finish))

    def _cancel(self, request_id: str) -> None:
        ticket = self._tickets.get(request_id)
        if ticket is None:
            return
        is_waiting = ticket in self._waiting_for_slot
        self._drop(ticket)
        if is_waiting:
            self._dispatch(Event(request_id, finish=Finish("cancelled", len(ticket.prompt), 0, 0)))

    def _dispatch(self, event: Event) -> None:
        """Hand an event to its sink; of one that ends a request, give its lease back first."""
        ticket = self._tickets.get(event.request_id)
        if ticket is None:  # it was ended before: it had waited too long
            return
        self._begun.add(event.request_id)
        self.counts.new_tokens += event.chosen is not None
        if event.finish is not None:
            self._end(event.request_id, event.finish)
        try:
            ticket.sink(event)
        except Exception:
            logger.exception("an event could not be handed on")
            self._engine.cancel(event.request_id)

    def _end(self, request_id: str, finish: Finish) -> None:
        del self._tickets[request_id]
        self._begun.discard(request_id)
        lease = self._leases.pop(request_id, None)
        if lease is not None:
            self.slots.release(lease)
        counts = self.counts
        counts.finished[finish.reason] = counts.finished.get(finish.reason, 0) + 1
        counts.prompt_tokens += finish.prompt_tokens
        counts.reused_tokens += finish.reused_tokens

    def _end_all(self) -> None:
        for request_id in list(self._tickets):
            ticket = self._tickets[request_id]
            self._dispatch(Event(request_id, finish=Finish("cancelled", len(ticket.prompt), 0, 0, "the server ends")))
