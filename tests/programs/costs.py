"""What a command takes: of processor time, and of memory at its peak."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.programs.outcomes import Cost

LORA_KIT: Final = (sys.executable, "-m", "lora_kit")


_LAUNCHER: Final = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[2:], stdout=sys.stderr)
_, status, usage = os.wait4(process.pid, 0)
with open(sys.argv[1], "w") as file:
    json.dump([os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024], file)
"""
"""Starts a command from a process that is small: the peak of a child begins with the memory of what started it."""


def run_measured(
    command: Sequence[str | Path], *, variables: Mapping[str, str] | None = None, folder: Path | None = None
) -> Cost:
    """Run a command to its end, and return what it took, its own child processes included.

    Raises:
        RuntimeError: it failed; the message has its last line.
    """
    with tempfile.TemporaryDirectory() as place:
        facts = Path(place) / "facts.json"
        launch = [sys.executable, "-S", "-c", _LAUNCHER, facts, *command]
        done = subprocess.run(
            [str(part) for part in launch], stderr=subprocess.PIPE, env=variables, cwd=folder, check=True
        )
        code, seconds, megabytes = json.loads(facts.read_text(encoding="utf-8"))
    if code:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise RuntimeError(f"{Path(command[0]).name} ended with {code}: {' '.join(last)}")
    return Cost(round(seconds, 2), round(megabytes, 1))
