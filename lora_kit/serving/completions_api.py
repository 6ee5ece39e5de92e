"""`/v1/completions`, `/v1/chat/completions` and the tokens of texts."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from sse_starlette.sse import EventSourceResponse

from lora_kit.adapter.adapter import Adapter
from lora_kit.serving.answering import Answers
from lora_kit.serving.api_access import RESPONSES, Key, Served, find_adapter, make_digest_headers
from lora_kit.serving.api_errors import ApiError, format_error, make_failure
from lora_kit.serving.completion_bodies import CompletionForm
from lora_kit.serving.schemas import ChatCompletionBody, CompletionBody, DetokenizeBody, TokenizeBody
from lora_kit.serving.served_model import ServedModel

_DISCONNECT_SECONDS: Final = 0.25
"""How often a client that waits for a whole answer is asked whether it is still there."""
_PING_SECONDS: Final = 15

_STREAMED: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "the answer; in pieces where `stream` is set", "content": {"text/event-stream": {}}}
}

router = APIRouter()


@router.post("/v1/completions", responses=RESPONSES | _STREAMED)
async def complete(request: Request, body: CompletionBody, served: Served, key: Key) -> Response:
    """Continue prompts, which are given to the model as they are."""
    body.check_extra()
    adapter = await find_adapter(served, key, body.model, body.lora_scale)
    _check_generates(served)
    most = served.settings.limits.requests
    if not 0 < len(body.prompts) * (body.n or 1) <= most:
        raise ApiError(400, f"1 to {most:,} answers can be asked for at once", param="prompt")
    prompts = await asyncio.to_thread(lambda: [served.prompts.encode_text(prompt) for prompt in body.prompts])
    answers = _make_answers(served, body, prompts, adapter, most=body.max_tokens, ends=served.prompts.end_tokens)
    return await _respond(request, served, body, answers, make_digest_headers(adapter))


@router.post("/v1/chat/completions", responses=RESPONSES | _STREAMED)
async def chat(request: Request, body: ChatCompletionBody, served: Served, key: Key) -> Response:
    """Answer a conversation, rendered by the chat template that the adapter was trained with."""
    body.check_extra()
    adapter = await find_adapter(served, key, body.model, body.lora_scale)
    _check_generates(served)
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    prompt = await asyncio.to_thread(served.prompts.encode_messages, messages, adapter, body.chat_template_kwargs)
    most = body.max_completion_tokens or body.max_tokens
    answers = _make_answers(served, body, [prompt.ids], adapter, most=most, ends=prompt.ends)
    return await _respond(request, served, body, answers, make_digest_headers(adapter))


@router.post("/tokenize", responses=RESPONSES)
async def tokenize(body: TokenizeBody, served: Served, key: Key) -> dict[str, Any]:
    """Return the tokens of a text."""
    ids = await asyncio.to_thread(served.prompts.tokenize, body.prompt, add_special_tokens=body.add_special_tokens)
    return {"tokens": ids, "count": len(ids), "max_model_len": served.context}


@router.post("/detokenize", responses=RESPONSES)
async def detokenize(body: DetokenizeBody, served: Served, key: Key) -> dict[str, Any]:
    """Return the text of tokens."""
    return {"prompt": served.prompts.detokenize(body.tokens)}


def _check_generates(served: ServedModel) -> None:
    if served.heads is not None:
        message = "this base predicts labels; it writes no text"
        raise ApiError(400, message, param="model", code="unsupported")


def _make_answers(
    served: ServedModel,
    body: CompletionBody | ChatCompletionBody,
    prompts: Sequence[Sequence[int]],
    adapter: Adapter | None,
    *,
    most: int | None,
    ends: frozenset[int],
) -> Answers:
    is_chat = isinstance(body, ChatCompletionBody)
    limit = served.choose_max_tokens(most, longest=max(map(len, prompts)), is_chat=is_chat)
    settings = body.build_settings(max_tokens=limit)
    return Answers(served.worker, prompts, settings, count=body.n or 1, adapter=adapter, end_tokens=ends)


async def _respond(
    request: Request,
    served: ServedModel,
    body: CompletionBody | ChatCompletionBody,
    answers: Answers,
    headers: dict[str, str],
) -> Response:
    form = CompletionForm(
        served.prompts.tokenizer,
        body.model,
        int(time.time()),
        fingerprint=served.fingerprint,
        is_chat=isinstance(body, ChatCompletionBody),
        has_logprobs=body.logprobs_count is not None,
        has_token_ids=bool(body.return_token_ids),
    )
    await answers.start()
    if body.stream:
        has_usage = (body.stream_options or {}).get("include_usage", False)
        events = _stream(form, answers, has_usage=has_usage)
        return EventSourceResponse(events, headers=headers, ping=_PING_SECONDS, sep="\n")
    await _wait(request, answers)
    return JSONResponse(form.write_whole(answers), headers=headers)


async def _wait(request: Request, answers: Answers) -> None:
    """Wait until every answer is whole; end them all if the client goes away.

    Raises:
        ApiError: one of them failed.
    """
    watcher = asyncio.create_task(_watch(request, answers))
    try:
        async for _ in answers.events():
            pass
    finally:
        watcher.cancel()
    for answer in answers.all:
        if answer.finish is not None and answer.finish.reason == "error":
            raise make_failure(answer.finish)


async def _watch(request: Request, answers: Answers) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(_DISCONNECT_SECONDS)
    answers.cancel()


async def _stream(form: CompletionForm, answers: Answers, *, has_usage: bool) -> AsyncIterator[dict[str, str]]:
    """Yield server-sent events; if the client goes away, every answer ends."""
    try:
        if form.is_chat:
            for answer in answers.all:
                yield _as_event(form.write_first_chunk(answers, answer))
        async for answer, event in answers.events():
            if event.finish is not None and event.finish.reason == "error":
                yield _as_event(format_error(make_failure(event.finish)))
            elif event.text or event.finish is not None or form.has_logprobs or form.has_token_ids:
                yield _as_event(form.write_chunk(answers, answer, event))
        if has_usage:
            yield _as_event(form.write_usage(answers))
        yield {"data": "[DONE]"}
    finally:
        answers.cancel()


def _as_event(body: dict[str, Any]) -> dict[str, str]:
    return {"data": json.dumps(body)}  # ASCII: some clients end a line at U+2028 and its like
