"""Errors over HTTP, in the envelope of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lora_kit.errors import LoraKitError, StorageError, UnknownAdapterError
from lora_kit.serving.adapter_slots import NoFreeSlotError
from lora_kit.serving.engine import Finish, RequestError
from lora_kit.serving.tickets import OverloadedError

_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
_RETRY_SECONDS: Final = "1"


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        message: what was given, what was expected, what to do.
        param: the field of the request; None where it is not one field.
        code: for programs.
        headers: besides the usual ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers


def translate_error(error: BaseException) -> ApiError:
    """Return the answer for an error: what the library says; of any other, its kind alone."""
    if not isinstance(error, LoraKitError):
        return ApiError(500, f"the server failed: {type(error).__name__}", code="internal_error")
    message = str(error)
    if isinstance(error, UnknownAdapterError):
        # Without the hint, which lists names that this client may not know.
        return ApiError(404, error.message, param="model", code="model_not_found")
    if isinstance(error, RequestError):
        return ApiError(400, message, param=error.field, code=error.code)
    if isinstance(error, OverloadedError | NoFreeSlotError):
        return ApiError(429, message, code="overloaded", headers={"Retry-After": _RETRY_SECONDS})
    if isinstance(error, StorageError):
        return ApiError(507, message, code="storage")
    return ApiError(400, message)


def make_failure(finish: Finish) -> ApiError:
    """Return the answer for a request that failed: what it would have been, had it not had to wait before."""
    if finish.error is not None:
        return translate_error(finish.error)
    return ApiError(500, finish.message or "the answer failed", code="engine_error")


def format_error(error: ApiError) -> dict[str, Any]:
    """Return the envelope of an error."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def _respond(error: ApiError) -> JSONResponse:
    return JSONResponse(format_error(error), error.status, headers=error.headers)


def install_error_handlers(app: FastAPI) -> None:
    """Let every error of an app answer in the envelope."""

    @app.exception_handler(ApiError)
    async def _answer_api_error(request: Request, error: ApiError) -> JSONResponse:
        return _respond(error)

    @app.exception_handler(LoraKitError)
    async def _answer_own_error(request: Request, error: LoraKitError) -> JSONResponse:
        return _respond(translate_error(error))

    @app.exception_handler(Exception)
    async def _answer_unexpected_error(request: Request, error: Exception) -> JSONResponse:
        return _respond(translate_error(error))

    @app.exception_handler(RequestValidationError)
    async def _answer_invalid_body(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:]) or None
        return _respond(ApiError(400, f"{place or 'the body'}: {first['msg']}", param=place, code="invalid_value"))

    @app.exception_handler(HTTPException)
    async def _answer_http_error(request: Request, error: HTTPException) -> JSONResponse:
        return _respond(ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})))
