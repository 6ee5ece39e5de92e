"""How long something takes, and how much memory it needs at the most."""

from __future__ import annotations

import time

import torch


class Clock:
    """Wall time and peak memory of a piece of work, from the moment it is made."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._started = device, time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @property
    def seconds(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - self._started

    @property
    def peak_bytes(self) -> int:
        """The most memory in use: of the CUDA device since the start, or of the whole process since it began."""
        return peak_bytes(self._device)


def peak_bytes(device: torch.device) -> int:
    """The most memory in use so far: of a CUDA device since its count was set back, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    # Linux counts in kilobytes, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
