"""How long does a client wait, for the first token and between tokens?

1, 8 and 32 clients of the `openai` package stream answers of 8 adapters and the base over HTTP, from a server in
another process of the same machine, each beginning the next one as soon as it has the last: p50 and p99. Wall time on a
shared machine, which says less than the CPU time of `serving_load`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.serving_faults import server_process
from benchmarks.serving_models import BASE, Ask, asks, load, save_kinds

CLIENTS: Final = (1, 8, 32)


async def stream(client: Any, each: Ask) -> tuple[float, list[float]]:
    """Seconds to the first token, and between tokens."""
    body = {"model": each.model, "prompt": list(each.prompt), "max_tokens": each.new_tokens, "temperature": 0}
    started, times = time.perf_counter(), []
    answer = await client.completions.create(
        **body, stream=True, extra_body={"ignore_eos": True, "return_token_ids": True}
    )
    async for _ in answer:
        times.append(time.perf_counter())
    return times[0] - started, [late - early for early, late in itertools.pairwise(times)]


async def measure(address: str, asked: Sequence[Ask], clients: int) -> dict[str, Any]:
    """Percentiles in milliseconds, with so many clients at once."""
    from openai import AsyncOpenAI

    left, first, between = iter(asked), list[float](), list[float]()

    async def work(client: Any) -> None:
        for each in left:
            waited, gaps = await stream(client, each)
            first.append(waited)
            between.extend(gaps)

    started = time.perf_counter()
    async with AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600) as client:
        await asyncio.gather(*(work(client) for _ in range(clients)))
    seconds = time.perf_counter() - started
    return {
        "first_token_ms": percentiles(first),
        "between_tokens_ms": percentiles(between),
        "tokens_per_second": sum(each.new_tokens for each in asked) / seconds,
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": 1e3 * cuts[49], "p99": 1e3 * cuts[98]}


def latency(requests: int = 64) -> dict[str, Any]:
    """Percentiles by number of clients."""
    with tempfile.TemporaryDirectory() as place:
        base = load()
        names = save_kinds(base, Path(place))
        with server_process(Path(place), Path(place) / "state.json") as (_, http):
            address, asked = str(http.base_url), asks(base, [BASE, *names], requests, longest=80)
            asyncio.run(measure(address, asked[:16], 8))  # adapters come into their slots
            return {str(count): asyncio.run(measure(address, asked, count)) for count in CLIENTS}


if __name__ == "__main__":
    print(json.dumps(latency(), indent=2))
