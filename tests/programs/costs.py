"""What a command takes: of processor time, and of memory at its peak."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.programs.outcomes import Cost

LORA_KIT: Final = (sys.executable, "-m", "lora_kit")


def run_measured(
    command: Sequence[str | Path], *, variables: Mapping[str, str] | None = None, folder: Path | None = None
) -> Cost:
    """Run a command to its end, and return what it took, its own child processes included.

    Raises:
        RuntimeError: it failed; the message has its last line.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=output, stderr=subprocess.STDOUT, env=variables, cwd=folder
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            last = output.read().decode("utf-8", "replace").strip().splitlines()[-1:]
            raise RuntimeError(f"{Path(command[0]).name} ended with {process.returncode}: {' '.join(last)}")
    return Cost(round(usage.ru_utime + usage.ru_stime, 2), round(usage.ru_maxrss / 1024, 1))
