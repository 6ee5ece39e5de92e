"""`python -m lora_kit.sweeps FOLDER PARENT`: one worker of a sweep, started by the process that shares it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from lora_kit.errors import LoraKitError
from lora_kit.sweeps.sweep_plan import Plan
from lora_kit.sweeps.worker import Worker


def main(folder: str, parent: str) -> int:
    """Work on the sweep of a folder until every trial has ended, or the parent has."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("lora_kit").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
    try:
        Worker(Plan.read(Path(folder))).run()
    except LoraKitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _end_with(parent: int) -> None:
    """Stop as on SIGTERM once the parent is gone: nobody would know of this worker."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
