"""What the measurements of the server share: its base, adapters of every kind, prompts, a server in a thread."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

import lora_kit as lk
from lora_kit.models.loading import Base
from lora_kit.serving.served_model import ServedModel
from lora_kit.serving.server_settings import ServerSettings

BASE: Final = "kit-base"
KINDS: Final[dict[str, dict[str, Any]]] = {
    "plain": {"r": 16},
    "small": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "dora": {"use_dora": True, "r": 8},
    "head": {"target_modules": ["q_proj", "lm_head"], "r": 4},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"], "r": 3},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"], "r": 8},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [40, 41, 42], "r": 4},
    "mlp": {"target_modules": ["gate_proj", "down_proj"], "r": 8},
}
"""Eight adapters: ranks 2 to 16, a DoRA, head, embedding, a saved module, token embeddings."""


def load() -> Base:
    """The embedded base, in fp32 on the CPU."""
    return lk.load_base(BASE, dtype="fp32", device="cpu")


def adapter(base: Base, seed: int, **fields: Any) -> lk.Adapter:
    """A random adapter strong enough to change what is written."""
    torch.manual_seed(seed)
    config = {"r": 8, "lora_alpha": 64, "init_lora_weights": False, "target_modules": "all-linear", **fields}
    bank = lk.attach(base.model, lk.LoraConfig.from_dict(config), name="made")
    try:
        return bank.snapshot("made")
    finally:
        bank.detach()


def save_kinds(base: Base, store: Path) -> list[str]:
    """Save an adapter of each kind; return their names."""
    for seed, (name, fields) in enumerate(KINDS.items()):
        adapter(base, seed, **fields).save(store / name)
    return list(KINDS)


@dataclass(frozen=True)
class Ask:
    """A request of a measurement.

    Attributes:
        model: name of an adapter, or of the base.
        prompt: token ids.
        new_tokens: of the answer, exactly.
    """

    model: str
    prompt: tuple[int, ...]
    new_tokens: int


def asks(base: Base, models: Sequence[str], count: int, *, seed: int = 0, longest: int = 120) -> list[Ask]:
    """Requests of mixed lengths; half of the prompts have one long beginning."""
    generator, size = random.Random(seed), base.model.config.vocab_size

    def draw(length: int) -> tuple[int, ...]:
        return tuple(generator.randrange(3, size) for _ in range(length))

    shared = draw(longest // 2)
    return [
        Ask(
            models[number % len(models)],
            (shared if number % 2 else ()) + draw(generator.randint(4, longest // 2)),
            generator.randint(8, 56),
        )
        for number in range(count)
    ]


def write_alone(base: Base, asked: Sequence[Ask], store: Path) -> list[list[int]]:
    """What each request's model writes alone, by `generate`."""
    written = []
    for each in asked:
        bank, ids = lk.attach(base.model, slots=1, max_rank=16), torch.tensor([each.prompt])
        if each.model != BASE:
            bank.load("alone", store / each.model)
            bank.use("alone")
        options = {"do_sample": False, "max_new_tokens": each.new_tokens, "min_new_tokens": each.new_tokens}
        out = base.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        written.append(list(out[0, len(each.prompt) :].tolist()))
        bank.detach()
    return written


@contextmanager
def running_server(settings: ServerSettings) -> Iterator[tuple[ServedModel, str]]:
    """A server in a thread of this process; its address."""
    import uvicorn

    from lora_kit.serving.http_app import build_app

    served = ServedModel(settings)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(build_app(served), log_level="error", access_log=False))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    try:
        yield served, f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        served.close()


def resident_bytes() -> int:
    """Memory that this process has in use."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds_of(pid: int) -> float:
    """CPU time of all threads of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
