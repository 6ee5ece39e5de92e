"""What every route needs: the server, and who asks."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Final

from fastapi import Depends, Request

from lora_kit.adapter.adapter import Adapter
from lora_kit.serving.access import AccessKey
from lora_kit.serving.api_errors import ApiError
from lora_kit.serving.served_model import ServedModel

DIGEST_HEADER: Final = "lora-kit-digest"
"""Header of an answer: the digest of the adapter that gave it."""
RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    400: {"description": "what was given is wrong"},
    401: {"description": "a key is needed"},
    403: {"description": "the key does not allow this"},
    404: {"description": "no such model"},
    413: {"description": "the body is too large"},
    429: {"description": "too much is waiting"},
}
"""Errors that a route may answer with, for the description of the API."""


def get_served(request: Request) -> ServedModel:
    """Return the server of an app."""
    served: ServedModel = request.app.state.served
    return served


def require_key(request: Request) -> AccessKey:
    """Return what the client may do.

    Raises:
        ApiError: it has no key, or a wrong one, or sends too many requests.
    """
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    found = get_served(request).keys.find(key if scheme.lower() == "bearer" else None)
    if found is None:
        message = "no key, or a wrong one, was given: send 'Authorization: Bearer KEY'"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
    if not get_served(request).rate.take(found.name):
        raise ApiError(429, "too many requests with this key", code="rate_limit", headers={"Retry-After": "1"})
    return found


Served = Annotated[ServedModel, Depends(get_served)]
Key = Annotated[AccessKey, Depends(require_key)]


def require_admin(key: Key) -> AccessKey:
    """Return what the client may do, if that is everything.

    Raises:
        ApiError: it is not.
    """
    if not key.is_admin:
        raise ApiError(403, "this needs a key that administers the server", code="not_allowed")
    return key


def check_may_ask(key: AccessKey, model: str) -> None:
    """Raise ApiError where a key does not allow a model, as if there were none."""
    if not key.may_ask(model.partition("@")[0]):
        raise ApiError(404, f"no model is called {model!r}", param="model", code="model_not_found")


async def find_adapter(
    served: ServedModel, key: AccessKey, model: str, scale: float | None, *, fitted: bool = True
) -> Adapter | None:
    """Return the adapter that a client named; None for the base.

    Args:
        scale: factor of its update.
        fitted: whether it is as it comes into a slot, or as it was stored.

    Raises:
        ApiError: there is none, or the key does not allow it: whether there is one that is not allowed is not revealed.
        LoraKitError: its folder cannot be read.
    """
    check_may_ask(key, model)
    return await asyncio.to_thread(served.find_adapter, model, scale, fitted=fitted)


def make_digest_headers(adapter: Adapter | None) -> dict[str, str]:
    """Return headers that name the content which answers; none for the base."""
    return {} if adapter is None else {DIGEST_HEADER: adapter.digest}
