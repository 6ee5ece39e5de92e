"""Does everybody get the answer of the adapter that they asked for, whatever else happens?

100 requests at once by the unmodified `openai` client over 8 adapters (ranks 2 to 16, DoRA, head, embedding, a saved
module, token embeddings) and the base, half of them streamed, half with a shared beginning, read in chunks of few
tokens: each must be what `generate` writes with that adapter alone. The same with a cache that does not look at the
digest must fail. A storm: 8 clients stream a name that is replaced 200 times (A, B, A, …), others load, unload, cancel
and run out of slots; every answer must be one content's whole.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from benchmarks.serving_models import (
    BASE,
    Ask,
    adapter,
    asks,
    load,
    resident_bytes,
    running_server,
    save_kinds,
    write_alone,
)
from lora_kit.serving.engine import EngineRequest
from lora_kit.serving.server_settings import ServerSettings
from lora_kit.serving.tickets import QueueLimits

STEP_TOKENS: Final = 24
ROWS: Final = 8
"""Requests that run at once: later ones find the keys and values of earlier ones."""
CLIENTS: Final = 8
PATIENT: Final = QueueLimits(seconds=3600)
"""On a slow machine nobody is turned away."""


async def complete(client: Any, each: Ask, *, streams: bool) -> list[int]:
    """The tokens of an answer."""
    body = {"model": each.model, "prompt": list(each.prompt), "temperature": 0, "max_tokens": each.new_tokens}
    extra = {"return_token_ids": True, "ignore_eos": True}
    if not streams:
        answer = await client.completions.create(**body, extra_body=extra)
        return list(answer.choices[0].token_ids)
    tokens: list[int] = []
    async for chunk in await client.completions.create(**body, stream=True, extra_body=extra):
        tokens += chunk.choices[0].token_ids or []
    return tokens


async def complete_all(address: str, asked: Sequence[Ask]) -> list[list[int]]:
    """The answers to all at once, every other one streamed."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600) as client:
        each = (complete(client, one, streams=number % 2 == 0) for number, one in enumerate(asked))
        return list(await asyncio.gather(*each))


def exactness(count: int = 100) -> dict[str, int]:
    """How many of so many answers at once are those of each adapter alone: twice, and with a planted mistake."""
    with tempfile.TemporaryDirectory() as place:
        store, base = Path(place), load()
        asked = asks(base, [BASE, *save_kinds(base, store)], count)
        expected = write_alone(base, asked, store)
        settings = ServerSettings(base=BASE, store=store, dtype="fp32", slots=8, max_rank=16, rows=ROWS, limits=PATIENT)
        found = {"asked": count}
        with patch("lora_kit.serving.rows_engine.STEP_TOKENS", STEP_TOKENS), running_server(settings) as (_, address):
            for name in ("right", "right, the cache warm"):
                found[name] = count_equal(asyncio.run(complete_all(address, asked)), expected)
        planted = patch.object(EngineRequest, "content", property(lambda self: ""))
        with planted, running_server(settings) as (_, address):
            given = asyncio.run(complete_all(address, asked))
            found["right, with a cache that ignores the digest"] = count_equal(given, expected)
    return found


def count_equal(given: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> int:
    return sum(list(one) == list(other) for one, other in zip(given, expected, strict=True))


# The storm


class Storm:
    """Clients that stream one name while its content is replaced, and others that change the server.

    Args:
        address: of the server.
        asked: what is asked of `prod`.
        contents: its whole answers by the name of each content.
    """

    def __init__(self, address: str, asked: Sequence[Ask], contents: Sequence[Sequence[list[int]]]) -> None:
        self.address, self.asked, self.contents = address, asked, contents
        self.wrong = self.failed = self.answers = self.replaced = self.cancelled = 0
        self.ended = False

    async def run(self, replacements: int) -> None:
        from httpx import AsyncClient
        from openai import AsyncOpenAI

        openai = AsyncOpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=600)
        async with openai as client, AsyncClient(base_url=self.address, timeout=600) as http:
            await self.replace(http, 0)
            streams = [asyncio.create_task(self.stream(client, number)) for number in range(CLIENTS)]
            others = [asyncio.create_task(each(client, http)) for each in (self.hang_up, self.load_others, self.sample)]
            for number in range(1, replacements + 1):
                await self.replace(http, number)
                await asyncio.sleep(0.01)
            self.ended = True
            await asyncio.gather(*streams, *others)

    async def replace(self, http: Any, number: int) -> None:
        body = {"lora_name": "prod", "lora_path": f"n{number % 2}"}
        answer = await http.post("/v1/load_lora_adapter", json=body)
        self.replaced += answer.status_code == 200
        self.failed += answer.status_code != 200

    async def stream(self, client: Any, number: int) -> None:
        while not self.ended:
            place = number % len(self.asked)
            tokens = await self.attempt(complete(client, self.asked[place], streams=True))
            if tokens is not None:
                self.answers += 1
                self.wrong += tokens not in [answers[place] for answers in self.contents]
            number += 1

    async def attempt(self, answer: Any) -> Any:
        try:
            return await answer
        except Exception as error:  # counted, and shown
            self.failed += 1
            print(f"failed: {type(error).__name__}: {str(error)[:200]}", flush=True)
            return None

    async def hang_up(self, client: Any, http: Any) -> None:
        """Begin answers and leave in the middle."""
        while not self.ended:
            body = {"model": "prod", "prompt": list(self.asked[0].prompt), "max_tokens": 100, "stream": True}
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                async for _ in answer.aiter_lines():
                    self.cancelled += 1
                    break

    async def load_others(self, client: Any, http: Any) -> None:
        """Ask 16 adapters in turn over 4 slots, and load and unload a label."""
        number = 0
        while not self.ended:
            model = f"n{number % 16}"
            await self.attempt(complete(client, Ask(model, self.asked[0].prompt, 4), streams=False))
            await http.post("/v1/load_lora_adapter", json={"lora_name": "other", "lora_path": model})
            await http.post("/v1/unload_lora_adapter", json={"lora_name": "other"})
            number += 1

    async def sample(self, client: Any, http: Any) -> None:
        """Ask for 4 answers at once."""
        while not self.ended:
            body = {"model": "prod", "prompt": "The fox", "n": 4, "max_tokens": 8, "temperature": 1}
            answer = await http.post("/v1/completions", json=body)
            self.failed += answer.status_code != 200 or len(answer.json()["choices"]) != 4


def storm(replacements: int = 200) -> dict[str, Any]:
    """What came of a storm; memory after its second half beside that after its first."""
    with tempfile.TemporaryDirectory() as place:
        store, base = Path(place), load()
        for number in range(16):
            adapter(base, number, r=4).save(store / f"n{number}")
        asked = [Ask("prod", each.prompt, 24) for each in asks(base, ["prod"], 16, seed=5)]
        contents = [write_alone(base, [Ask(f"n{n}", each.prompt, 24) for each in asked], store) for n in range(2)]
        assert all(one != other for one, other in zip(*contents, strict=True))
        settings = ServerSettings(base=BASE, store=store, dtype="fp32", slots=4, max_rank=4, rows=16, limits=PATIENT)
        with running_server(settings) as (_, address):
            bytes_after, result = list[int](), dict[str, int]()
            for _ in range(2):
                run = Storm(address, asked, contents)
                asyncio.run(run.run(replacements // 2))
                bytes_after.append(resident_bytes())
                for key in ("answers", "wrong", "failed", "replaced", "cancelled"):
                    result[key] = result.get(key, 0) + getattr(run, key)
    return {**result, "memory": bytes_after[1] / bytes_after[0]}


if __name__ == "__main__":
    print(json.dumps({"exactness": exactness(), "storm": storm()}, indent=2))
