"""What every reader shares: a file of jobs in, a file of results out. Runs in each program's own environment.

A job is {"key", "base", "adapter", "tokens", "logits"}: folders (`adapter` may be null), token ids, and where the
logits (len(tokens), vocabulary) are written as fp32 in numpy's format. A result is {"key", "seconds", "error"}.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def run_jobs(compute: Callable[[dict[str, Any]], Any], version: str) -> None:
    """Compute the logits of every job of the file `sys.argv[1]`, and write the results to `sys.argv[2]`.

    Args:
        compute: returns the logits of a job, as something that numpy makes an array of.
        version: of the program.
    """
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    results = [_run_job(compute, job) for job in jobs]
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump({"version": version, "results": results}, file)


def _run_job(compute: Callable[[dict[str, Any]], Any], job: dict[str, Any]) -> dict[str, Any]:
    started, error = time.perf_counter(), None
    try:
        logits = np.asarray(compute(job), dtype=np.float32)
        np.save(job["logits"], logits.reshape(-1, logits.shape[-1]))
    except Exception as failure:  # a program that fails on one file says so, and reads the next
        error = f"{type(failure).__name__}: {failure}"[:500]
    return {"key": job["key"], "seconds": time.perf_counter() - started, "error": error}
