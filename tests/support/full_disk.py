"""A process whose files may only be so large, as on a disk that fills up."""

from __future__ import annotations

import os
import resource
import traceback
from collections.abc import Callable
from typing import Any

from lora_kit.errors import StorageError
from tests.support.processes import in_child


def run_on_full_disk(work: Callable[[], Any], *, largest: int) -> tuple[int, str]:
    """Run work in a process in which no file grows beyond some bytes; return its exit code and its StorageError."""
    said, write = os.pipe()

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        try:
            work()
        except StorageError as error:
            os.write(write, str(error).encode())
            os._exit(error.exit_code)
        except BaseException:
            traceback.print_exc()
            raise

    code = in_child(limited)
    os.close(write)
    with os.fdopen(said, "rb") as message:
        return code, message.read().decode()
