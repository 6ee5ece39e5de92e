"""What the server offers: models, adapters with what is known of them, loading, aliases, pins."""

from __future__ import annotations

import asyncio
from typing import Final

from fastapi import APIRouter, Depends

from lora_kit.io.strict_json import JsonObject
from lora_kit.serving.api_access import RESPONSES, Key, Served, check_may_ask, require_admin
from lora_kit.serving.schemas import AliasBody, LoadBody, UnloadBody

_CHANGED: Final = RESPONSES | {507: {"description": "the state file cannot be written"}}

router = APIRouter()
administration = APIRouter(dependencies=[Depends(require_admin)])


@router.get("/v1/models", responses={401: RESPONSES[401]})
async def list_models(served: Served, key: Key) -> JsonObject:
    """List what may be asked: the base, every adapter of the store, what was loaded, aliases."""
    models = await asyncio.to_thread(served.list_models)
    return {"object": "list", "data": [model for model in models if key.may_ask(model["id"])]}


@router.get("/v1/adapters", responses={401: RESPONSES[401]})
async def list_adapters(served: Served, key: Key) -> JsonObject:
    """List adapters with digest, residency, leases and hits."""
    adapters = await asyncio.to_thread(served.list_adapters)
    return {"data": [adapter for adapter in adapters if key.may_ask(adapter["label"])]}


@router.get("/v1/adapters/{label}", responses=RESPONSES)
async def describe_adapter(label: str, served: Served, key: Key) -> JsonObject:
    """Return what is known of an adapter, its model card and what was measured of it."""
    check_may_ask(key, label)
    return await asyncio.to_thread(served.describe_adapter, label)


@administration.post("/v1/load_lora_adapter", responses=_CHANGED)
async def load(body: LoadBody, served: Served) -> JsonObject:
    """Let a label stand for an adapter of the store, after it has computed something."""
    return await asyncio.to_thread(served.load, body.lora_name, body.lora_path)


@administration.post("/v1/unload_lora_adapter", responses=_CHANGED)
async def unload(body: UnloadBody, served: Served) -> JsonObject:
    """Take a label away; requests that have begun finish on its content."""
    await asyncio.to_thread(served.unload, body.lora_name)
    return {"status": "unloaded", "label": body.lora_name}


@administration.put("/v1/aliases/{alias}", responses=_CHANGED)
async def set_alias(alias: str, body: AliasBody, served: Served) -> JsonObject:
    """Let an alias stand for a label, from one request to the next."""
    await asyncio.to_thread(served.set_alias, alias, body.label)
    return {"alias": alias, "label": body.label}


@administration.delete("/v1/aliases/{alias}", responses=_CHANGED)
async def remove_alias(alias: str, served: Served) -> JsonObject:
    """Take an alias away."""
    await asyncio.to_thread(served.labels.remove_alias, alias)
    return {"alias": alias, "label": None}


@administration.put("/v1/adapters/{label}/pin", responses=_CHANGED)
async def pin(label: str, served: Served) -> JsonObject:
    """Keep an adapter in its slot."""
    await asyncio.to_thread(served.pin, label, pinned=True)
    return {"label": label, "pinned": True}


@administration.delete("/v1/adapters/{label}/pin", responses=_CHANGED)
async def unpin(label: str, served: Served) -> JsonObject:
    """Let an adapter leave its slot when another one needs it."""
    await asyncio.to_thread(served.pin, label, pinned=False)
    return {"label": label, "pinned": False}
