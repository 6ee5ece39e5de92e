"""From a request of a client to the events of the engine: prompts, several answers to each, one stream of events."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import AsyncIterator, Sequence

from lora_kit.adapter.adapter import Adapter
from lora_kit.serving.engine import Event, Finish
from lora_kit.serving.model_worker import ModelWorker
from lora_kit.serving.sampler import ChosenToken, SamplingSettings
from lora_kit.serving.tickets import Ticket


@dataclasses.dataclass
class ServedAnswer:
    """One answer as it grows.

    Attributes:
        index: among the answers of its request.
        text: so far.
        tokens: so far.
        finish: how it ended; None while it goes on.
    """

    index: int
    text: str = ""
    tokens: list[ChosenToken] = dataclasses.field(default_factory=list)
    finish: Finish | None = None

    def take(self, event: Event) -> None:
        """Grow by an event."""
        self.text += event.text
        if event.chosen is not None:
            self.tokens.append(event.chosen)
        self.finish = event.finish


class Answers:
    """The answers to one request: `count` for each prompt, in the order of the prompts.

    Attributes:
        request_id: of the client's request.
        all: every answer.
    """

    def __init__(
        self,
        worker: ModelWorker,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        *,
        count: int,
        adapter: Adapter | None,
        end_tokens: frozenset[int],
    ) -> None:
        self.request_id = uuid.uuid4().hex
        self.all = [ServedAnswer(index) for index in range(len(prompts) * count)]
        self._worker = worker
        self._prompt_tokens = sum(map(len, prompts))
        self._events = asyncio.Queue[tuple[int, Event]]()
        loop = asyncio.get_running_loop()

        def make_ticket(index: int) -> Ticket:
            def hand_over(event: Event) -> None:
                loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

            # Answers to one prompt differ by their seeds, which follow from the first one's.
            seed = None if settings.seed is None else (settings.seed + index % count) % 2**63
            own = dataclasses.replace(settings, seed=seed)
            name = f"{self.request_id}-{index}"
            return Ticket(name, tuple(prompts[index // count]), own, adapter, end_tokens, hand_over)

        self._tickets = [make_ticket(answer.index) for answer in self.all]

    async def start(self) -> None:
        """Submit every answer.

        Raises:
            RequestError, OverloadedError, AdapterError: one of them cannot run; none does then.
        """
        futures = [asyncio.wrap_future(self._worker.submit(ticket)) for ticket in self._tickets]
        results = await asyncio.gather(*futures, return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        if failures:
            self.cancel()
            raise failures[0]

    def cancel(self) -> None:
        """End every answer that goes on."""
        for ticket, answer in zip(self._tickets, self.all, strict=True):
            if answer.finish is None:
                self._worker.cancel(ticket.request_id)

    async def events(self) -> AsyncIterator[tuple[ServedAnswer, Event]]:
        """Yield every event with the answer that has grown by it, until all have ended."""
        while any(answer.finish is None for answer in self.all):
            index, event = await self._events.get()
            self.all[index].take(event)
            yield self.all[index], event

    @property
    def usage(self) -> dict[str, object]:
        """Tokens of prompts and answers, as OpenAI's API counts them: a prompt once, however many answers it has."""
        prompt = self._prompt_tokens
        new = sum(len(answer.tokens) for answer in self.all)
        reused = sum(answer.finish.reused_tokens for answer in self.all if answer.finish)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": min(reused, prompt)},
        }
