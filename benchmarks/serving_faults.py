"""What does a fault reach? Only the request whose fault it is.

A server as a process of its own: a prompt beyond the context, a token out of range, a folder that is torn and one that
is deleted under it, 300 clients that hang up, a state file that cannot be written, `kill -9` and a start on the same
state. And one in this process: an exception in a layer, and a forward that is stuck.
"""

from __future__ import annotations

import asyncio
import json
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from benchmarks.serving_models import BASE, adapter, cpu_seconds_of, load, running_server
from lora_kit.serving.server_settings import ServerSettings

_START: Final = "import sys; from lora_kit.cli import main; sys.exit(main())"
_HANG_UPS: Final = 300


@contextmanager
def server_process(store: Path, state: Path) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """A server as a process, and an HTTP client of it; killed at the end."""
    import httpx

    flags = ["--base", BASE, "--store", str(store), "--dtype", "fp32", "--port", "0", "--state", str(state)]
    command = [sys.executable, "-c", _START, "serve", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[3].rstrip(";")
        with httpx.Client(base_url=address, timeout=120) as client:
            try:
                yield process, client
            finally:
                process.kill()


def ask(client: Any, model: str = "good", **fields: Any) -> Any:
    body = {"model": model, "prompt": "The fox", "max_tokens": 4, "temperature": 0, **fields}
    return client.post("/v1/completions", json=body)


def in_a_process() -> dict[str, Any]:
    """The faults that a client, the disk and the system make."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        store, state = Path(place) / "store", Path(place) / "state.json"
        base = load()
        for seed, name in enumerate(("good", "torn", "gone")):
            adapter(base, seed, r=4).save(store / name)
        with server_process(store, state) as (process, client):
            good = ask(client).json()["choices"][0]["text"]
            found["beyond the context"] = ask(client, max_tokens=10**6).status_code
            found["a token out of range"] = ask(client, prompt=[10**9]).status_code
            found["an unknown adapter"] = ask(client, "nobody").status_code
            found["a folder deleted, and torn"] = [break_folder(client, store, name) for name in ("gone", "torn")]
            found["300 clients that hang up, then running"] = hang_up(client)
            found["a full disk at the state file"] = fill_disk(client, process.pid)
            for method, path, body in (
                ("POST", "/v1/load_lora_adapter", {"lora_name": "prod", "lora_path": "good"}),
                ("PUT", "/v1/aliases/chat", {"label": "prod"}),
                ("PUT", "/v1/adapters/prod/pin", None),
            ):
                assert client.request(method, path, json=body).status_code == 200, path
            before = client.get("/v1/adapters").json()["data"]
            found["good answers all the time"] = ask(client).json()["choices"][0]["text"] == good
            process.send_signal(signal.SIGKILL)
        found |= start_again(store, state, before, good)
    return found


def start_again(store: Path, state: Path, before: Any, good: str) -> dict[str, Any]:
    """What is there again after kill -9, and how long the first answer took."""
    started = time.monotonic()
    with server_process(store, state) as (process, client):
        text = ask(client, "chat").json()["choices"][0]["text"]
        wall = time.monotonic() - started
        cpu = cpu_seconds_of(process.pid)
        after = client.get("/v1/adapters").json()["data"]
    same = list_labels(after) == list_labels(before)
    return {
        "after kill -9: labels, aliases, pins are there": same and text == good,
        "after kill -9: seconds to the first answer": round(wall, 2),
        "after kill -9: CPU seconds to the first answer": round(cpu, 2),
    }


def list_labels(adapters: Any) -> list[tuple[str, str, bool]]:
    return sorted((each["label"], str(each["alias_of"]), each["pinned"]) for each in adapters)


def break_folder(client: Any, store: Path, name: str) -> int:
    """Answer with an adapter, then take its folder or the end of its weights away, and ask again."""
    assert ask(client, name).status_code == 200
    if name == "gone":
        shutil.rmtree(store / name)
    else:
        weights = store / name / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    status = ask(client, name).status_code
    assert isinstance(status, int)
    return status


def hang_up(client: Any) -> int:
    """Begin many answers and leave; return how many run two seconds later."""
    import httpx

    async def leave(other: httpx.AsyncClient) -> None:
        body = {"model": "good", "prompt": "The fox", "max_tokens": 400, "stream": True, "ignore_eos": True}
        async with other.stream("POST", "/v1/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                return

    async def leave_all() -> None:
        limits = httpx.Limits(max_connections=_HANG_UPS)
        async with httpx.AsyncClient(base_url=client.base_url, timeout=120, limits=limits) as other:
            await asyncio.gather(*(leave(other) for _ in range(_HANG_UPS)), return_exceptions=True)

    asyncio.run(leave_all())
    deadline = time.monotonic() + 20
    while (running := read_running(client)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return running


def read_running(client: Any) -> int:
    lines = client.get("/metrics").text.splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_")))


def fill_disk(client: Any, pid: int) -> dict[str, Any]:
    """Let no file of the server grow beyond 20 bytes, and change an alias; then let it."""
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (20, limits[1]))
    failed = client.put("/v1/aliases/full", json={"label": "good"}).status_code
    unchanged = ask(client, "full").status_code
    resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    later = client.put("/v1/aliases/full", json={"label": "good"}).status_code
    return {"status": failed, "the alias is not there": unchanged == 404, "with space again": later}


def in_this_process() -> dict[str, Any]:
    """An exception in a layer, and a forward that is stuck."""
    import httpx

    found: dict[str, Any] = {}
    go_on, state = threading.Event(), {"fails": True}

    def disturb(*arguments: object) -> None:
        if state.pop("fails", False):
            raise RuntimeError("planted")
        if state.pop("hangs", False):
            go_on.wait(60)

    with tempfile.TemporaryDirectory() as store:
        settings = ServerSettings(base=BASE, store=Path(store), dtype="fp32", stuck_seconds=0.5)
        with running_server(settings) as (served, address), httpx.Client(base_url=address, timeout=120) as client:
            served._base.model.model.layers[0].register_forward_pre_hook(disturb)
            found["an exception in a layer, then the next request"] = [ask(client, BASE).status_code for _ in range(2)]
            state["hangs"] = True
            thread = threading.Thread(target=ask, args=(client, BASE))
            thread.start()
            time.sleep(2)
            stuck = client.get("/health").status_code
            go_on.set()
            thread.join()
            found["a stuck forward: health while it hangs, and after"] = [stuck, client.get("/health").status_code]
    return found


def faults() -> dict[str, Any]:
    """What each fault reached."""
    return {**in_a_process(), **in_this_process()}


if __name__ == "__main__":
    print(json.dumps(faults(), indent=2))
