"""A limit on the size of a request's body, whatever its headers say."""

from __future__ import annotations

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_kit.serving.api_errors import ApiError, format_error


class BodyLimit:
    """Middleware that answers 413 to a body that is too large, before it is read whole.

    Args:
        app: what answers otherwise.
        most: bytes of a body.
    """

    def __init__(self, app: ASGIApp, *, most: int) -> None:
        self.app = app
        self.most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        parts, size, more = list[Message](), 0, True
        while more:
            message = await receive()
            parts.append(message)
            size += len(message.get("body", b""))
            more = message["type"] == "http.request" and message.get("more_body", False)
            if size > self.most:
                error = ApiError(413, f"the body is larger than {self.most:,} bytes", code="too_large")
                await JSONResponse(format_error(error), 413)(scope, receive, send)
                return

        async def receive_again() -> Message:
            return parts.pop(0) if parts else await receive()

        await self.app(scope, receive_again, send)
