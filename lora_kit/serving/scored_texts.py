"""From texts of a client to the values that one forward gives for each: scores of labels, or embeddings."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence

from lora_kit.adapter.adapter import Adapter
from lora_kit.data.text_tokens import TextTokens
from lora_kit.serving.engine import Event, Finish, Wanted
from lora_kit.serving.model_worker import ModelWorker
from lora_kit.serving.sampler import SamplingSettings
from lora_kit.serving.tickets import Ticket


class FailedTextError(Exception):
    """The forward of a text failed.

    Attributes:
        finish: how it ended.
    """

    def __init__(self, finish: Finish) -> None:
        super().__init__(finish.message)
        self.finish = finish


async def score_texts(
    worker: ModelWorker, texts: Sequence[TextTokens], wanted: Wanted, adapter: Adapter | None
) -> list[Sequence[float]]:
    """Return the values of each text; if the caller is cancelled, nothing more is computed.

    Raises:
        RequestError, OverloadedError, AdapterError: one of them cannot run; none does then.
        FailedTextError: a forward failed.
    """
    loop, name = asyncio.get_running_loop(), uuid.uuid4().hex
    ends = [loop.create_future() for _ in texts]
    tickets = [
        _make_ticket(f"{name}-{number}", text, wanted, adapter, loop, end)
        for number, (text, end) in enumerate(zip(texts, ends, strict=True))
    ]
    try:
        await asyncio.gather(*(asyncio.wrap_future(worker.submit(ticket)) for ticket in tickets))
        events: list[Event] = list(await asyncio.gather(*ends))
    except BaseException:
        for ticket in tickets:
            worker.cancel(ticket.request_id)
        raise
    for event in events:
        if event.finish is not None and event.finish.reason != "stop":
            raise FailedTextError(event.finish)
    return [event.values for event in events]


def _make_ticket(
    request_id: str,
    text: TextTokens,
    wanted: Wanted,
    adapter: Adapter | None,
    loop: asyncio.AbstractEventLoop,
    end: asyncio.Future[Event],
) -> Ticket:
    def take(event: Event) -> None:
        if not end.done():
            end.set_result(event)

    def hand_over(event: Event) -> None:
        loop.call_soon_threadsafe(take, event)

    return Ticket(
        request_id,
        tuple(text.ids),
        SamplingSettings(max_tokens=1),
        adapter,
        frozenset(),
        hand_over,
        wanted=wanted,
        token_types=tuple(text.types or ()),
    )
