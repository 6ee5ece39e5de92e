"""Whether the server makes progress, and what it has done."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from lora_kit.serving.api_access import Key, Served

router = APIRouter()


@router.get("/health", responses={503: {"description": "the model makes no progress"}})
async def get_health(served: Served) -> Response:
    """Say whether the model's thread lives and its present step is not stuck."""
    stuck = served.worker.stuck_seconds
    is_well = served.worker.is_alive() and stuck < served.settings.stuck_seconds
    return JSONResponse(
        {"status": "ok" if is_well else "stuck", "step_seconds": round(stuck, 3)}, 200 if is_well else 503
    )


@router.get("/ready", responses={503: {"description": "not ready yet"}})
async def get_ready(served: Served) -> Response:
    """Say whether requests are taken."""
    is_ready = served.worker.is_alive()
    return JSONResponse({"status": "ready" if is_ready else "starting"}, 200 if is_ready else 503)


@router.get("/metrics", response_class=PlainTextResponse, responses={401: {"description": "a key is needed"}})
async def get_metrics(served: Served, key: Key) -> Response:
    """Report counts in Prometheus' format, under vLLM's names where they mean the same."""
    return Response(served.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
