"""How a server is started."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_kit.serving.tickets import QueueLimits


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a server is started.

    Attributes:
        base: hub id, local folder or `kit-base`.
        task: of the base: `causal-lm`, `seq2seq` or `classify`; None for what its adapters, or its own files, are for.
        labels: of an adapter, at most; 0 for as many as the widest one of the store has.
        store: folder of the adapters.
        host: address to listen at; other than loopback only with keys.
        port: to listen at.
        dtype: of the base, as in `load_base`.
        quantize: of the base, as in `load_base`.
        slots: adapters that are ready at once.
        max_rank: the largest rank of an adapter.
        rows: requests that run at once.
        context: tokens of prompt and answer, at most; None for what the base reads.
        aliases: labels by alias.
        keys: file of keys; None for none.
        rate: requests of one key, such as `60/minute`; None for no limit.
        state: file that keeps what was loaded, aliased and pinned; None to forget it.
        limits: what may wait.
        body_bytes: of a request's body, at most.
        stuck_seconds: how long a step may take before `/health` says that the server is stuck.
    """

    base: str
    store: Path
    task: str | None = None
    labels: int = 0
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str = "auto"
    quantize: str | None = None
    slots: int = 16
    max_rank: int = 64
    rows: int = 32
    context: int | None = None
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keys: Path | None = None
    rate: str | None = None
    state: Path | None = None
    limits: QueueLimits = dataclasses.field(default_factory=QueueLimits)
    body_bytes: int = 4 * 2**20
    stuck_seconds: float = 30.0

    @property
    def allowed_hosts(self) -> list[str]:
        """Names under which clients may call the server; others are what a hostile page would send."""
        return sorted({"127.0.0.1", "localhost", "[::1]", "::1", self.host} - {"0.0.0.0", "::"})
