"""A sweep shared by several processes that this one starts, watches and ends."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from lora_kit.errors import VerificationError, format_list
from lora_kit.io.text import escape_text
from lora_kit.sweeps.sweep_plan import Plan
from lora_kit.sweeps.worker import Worker

logger = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.5


def shared(plan: Plan, workers: int) -> None:
    """Work on a plan with several processes, until every trial has ended.

    Raises:
        VerificationError: every worker has ended, and trials are left.
    """
    watch = Worker(plan)
    with _started(plan, workers) as processes:
        while not watch.is_done:
            watch.check_there()
            watch.tell()
            if all(process.poll() is not None for process in processes):
                break
            time.sleep(_POLL_SECONDS)
        for number, process in enumerate(processes):
            if process.poll():
                log = escape_text(_log(plan, number))
                logger.warning("worker %d ended early, with code %d; see %s", number, process.returncode, log)
    watch.tell()
    if not watch.is_done:
        last = [line for number in range(workers) for line in _log(plan, number).read_text().splitlines()[-1:]]
        raise VerificationError(f"all {workers} workers ended before the sweep did: {format_list(last)}")


@contextlib.contextmanager
def _started(plan: Plan, workers: int) -> Iterator[Sequence[subprocess.Popen[bytes]]]:
    """Workers in processes of their own. What ends this one ends them too, at a step that is whole.

    They have a session of their own, since an interrupt from the terminal would reach them besides: one interrupt lets
    a training end its step, a second one does not.
    """
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(workers):
            command = [sys.executable, "-m", "lora_kit.sweeps", str(plan.folder), str(os.getpid())]
            with open(_log(plan, number), "wb") as log:
                processes.append(
                    subprocess.Popen(
                        command,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait()


def _log(plan: Plan, number: int) -> Path:
    return plan.folder / f"worker-{number}.log"
