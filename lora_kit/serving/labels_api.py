"""`/v1/classify` and `/v1/embeddings`: what one forward says of texts."""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import Coroutine, Sequence
from typing import Any, Final, TypeVar

import torch
from fastapi import APIRouter, Request, Response

from lora_kit.adapter.adapter import Adapter
from lora_kit.data.text_tokens import TextTokens
from lora_kit.errors import DataError
from lora_kit.evaluation.adapter_format import check_inputs
from lora_kit.evaluation.prediction import Prediction
from lora_kit.io.strict_json import JsonObject
from lora_kit.models.tasks import CLASSIFY
from lora_kit.serving.adapter_tasks import make_task_error
from lora_kit.serving.api_access import RESPONSES, Key, Served, find_adapter, make_digest_headers
from lora_kit.serving.api_errors import ApiError, make_failure
from lora_kit.serving.engine import RequestError, Wanted
from lora_kit.serving.schemas import ClassifyBody, EmbeddingBody
from lora_kit.serving.scored_texts import FailedTextError, score_texts
from lora_kit.serving.served_model import ServedModel
from lora_kit.serving.waiting_requests import make_length_error

Result = TypeVar("Result")

_DISCONNECT_SECONDS: Final = 0.25
"""How often a client is asked whether it is still there."""

router = APIRouter()


@router.post("/v1/classify", responses=RESPONSES)
async def classify(request: Request, body: ClassifyBody, served: Served, key: Key, response: Response) -> JsonObject:
    """Predict the label of texts, or of two texts each, with the probability of every label of the adapter."""
    heads = served.heads
    if heads is None:
        raise make_task_error("/v1/classify", CLASSIFY, served.task)
    adapter = await find_adapter(served, key, body.model, None, fitted=False)
    response.headers.update(make_digest_headers(adapter))
    head = heads.describe(adapter)
    length = min(head.max_length, served.context)
    inputs = body.texts
    _check_count(served, len(inputs))
    tokens = await asyncio.to_thread(served.prompts.encode_labeled, inputs, max_length=length)
    try:
        check_inputs(heads.base, body.model, adapter, are_pairs=not isinstance(inputs[0], str))
    except DataError as error:
        raise RequestError(error.message, field="input", code="invalid_value", hint=error.hint) from None
    scores = await _compute(request, served, tokens, "scores", adapter)
    predictions = [head.predict(row, is_cut=text.is_cut) for row, text in zip(scores, tokens, strict=True)]
    data = [_write_prediction(n, prediction) for n, prediction in enumerate(predictions)]
    return {
        "id": f"classify-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": body.model,
        "problem": head.problem,
        "data": data,
        "usage": _count_tokens(tokens),
    }


@router.post("/v1/embeddings", responses=RESPONSES)
async def embed(request: Request, body: EmbeddingBody, served: Served, key: Key, response: Response) -> JsonObject:
    """Return the mean of the last layer over the tokens of each text."""
    if served.heads is None:
        raise make_task_error("/v1/embeddings", CLASSIFY, served.task)
    adapter = await find_adapter(served, key, body.model, None, fitted=False)
    response.headers.update(make_digest_headers(adapter))
    inputs = body.texts
    _check_count(served, len(inputs))
    tokens = await asyncio.to_thread(_encode_whole, served, inputs)
    values = await _compute(request, served, tokens, "embedding", adapter)
    write = _write_base64 if body.encoding_format == "base64" else list
    data = [{"object": "embedding", "index": n, "embedding": write(row)} for n, row in enumerate(values)]
    return {"object": "list", "data": data, "model": body.model, "usage": _count_tokens(tokens)}


def _encode_whole(served: ServedModel, inputs: Sequence[str | list[int]]) -> list[TextTokens]:
    """Return texts as tokens; an embedding of a part would be another text's.

    Raises:
        RequestError: one is empty, or longer than the base reads.
    """
    texts = [text for text in inputs if isinstance(text, str)]
    encoded = iter(served.prompts.encode_labeled(texts, max_length=served.context))
    tokens = [next(encoded) if isinstance(text, str) else TextTokens(list(text), len(text)) for text in inputs]
    longest = max(text.length for text in tokens)
    if longest > served.context:
        raise make_length_error(longest, 0, served.context)
    return tokens


def _check_count(served: ServedModel, count: int) -> None:
    most = served.settings.limits.requests
    if not 0 < count <= most:
        raise ApiError(400, f"1 to {most:,} texts can be given at once", param="input")


async def _compute(
    request: Request, served: ServedModel, tokens: Sequence[TextTokens], wanted: Wanted, adapter: Adapter | None
) -> list[Sequence[float]]:
    fitted = None if adapter is None else await asyncio.to_thread(served.fit, adapter)
    try:
        return await _run_while_connected(request, score_texts(served.worker, tokens, wanted, fitted))
    except FailedTextError as error:
        raise make_failure(error.finish) from None


async def _run_while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of some work; end it when the client goes away."""
    task = asyncio.create_task(work)
    while not task.done():
        await asyncio.wait([task], timeout=_DISCONNECT_SECONDS)
        if not task.done() and await request.is_disconnected():
            task.cancel()
            raise ApiError(499, "the client went away", code="cancelled")
    return task.result()


def _write_prediction(index: int, prediction: Prediction) -> JsonObject:
    """Return a prediction as `predict` writes it, with the fields that vLLM's API has."""
    probabilities = list(prediction.probabilities.values())
    fields = {"index": index, **prediction.to_json()}
    return fields | ({"probs": probabilities, "num_classes": len(probabilities)} if probabilities else {})


def _write_base64(values: Sequence[float]) -> str:
    """Return numbers as float32, little-endian, in base64: what clients of OpenAI's API ask for."""
    return base64.b64encode(torch.tensor(values, dtype=torch.float32).numpy().astype("<f4").tobytes()).decode("ascii")


def _count_tokens(tokens: Sequence[TextTokens]) -> dict[str, int]:
    count = sum(len(text.ids) for text in tokens)
    return {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0}
