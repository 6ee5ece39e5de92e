"""Several processes of a training: as threads of this one, as its children, or started by torchrun."""

from __future__ import annotations

import gc
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lora_kit.training.loop.store_exchange import StoreExchange
from lora_kit.training.loop.world import World

SECONDS = 60


def in_threads(work: Callable[[World], Any], *, size: int = 2) -> list[Any]:
    """Return what `work` returns, or raises, in each process of a world whose processes are threads."""
    store, results = dist.HashStore(), [None] * size

    def run(rank: int) -> None:
        group = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, timedelta(seconds=SECONDS))

        def all_reduce(tensor: Tensor) -> None:
            group.allreduce([tensor]).wait()

        world = World(rank, size, exchange=StoreExchange(store), all_reduce=all_reduce)
        try:
            results[rank] = work(world)
        except BaseException as error:
            results[rank] = world.agree_on(error).with_traceback(None)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in threads), "the processes wait for each other"
    return results


def in_processes(work: Callable[[], Any], *, size: int = 2) -> list[Any]:
    """Return what `work` returns or raises in each of some children; their exit code where they neither do.

    They are given what a launcher gives. The first of them has the store.
    """
    children = [_start_child(work, rank, size, port=port) for port in [_find_free_port()] for rank in range(size)]
    return [_collect(*child) for child in children]


def get_rank() -> int:
    """Return the number of a child of `in_processes`."""
    return int(os.environ["TEST_RANK"])


def _start_child(work: Callable[[], Any], rank: int, size: int, *, port: int) -> tuple[int, int]:
    """Return the process id of a child and the pipe through which it gives its result."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    # Torch makes its pool of threads anew in a child; two threads that need it first would find none.
    torch.set_num_threads(1)
    gc.freeze()  # what has threads, as groups of gloo do, cannot be freed in a child
    names = {
        "TEST_RANK": rank,
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in names.items()}
    code = 1
    try:
        result: object = work()
        code = 0
    except SystemExit as error:
        result, code = None, int(error.code or 0)
    except BaseException as error:
        result = error
        code = 0
    finally:
        if code == 0:
            with open(write, "wb") as pipe:
                pipe.write(pickle.dumps(result))
        os._exit(code)


def _collect(child: int, read: int) -> Any:
    with open(read, "rb") as pipe:
        data = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return pickle.loads(data) if data else code


def _find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launch(processes: int, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Return what the processes that torchrun starts with `python` and these arguments did."""
    return subprocess.run(
        _build_command(processes, arguments),
        cwd=cwd,
        env=_build_environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def _build_command(processes: int, arguments: Sequence[str]) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*torchrun, *arguments]


def _build_environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
