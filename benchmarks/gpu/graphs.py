"""One call as a CUDA graph: recorded once, replayed as often as wanted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def captured(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """What replays `run` and returns its output, the same tensor each time; where there are no graphs, `run` itself."""
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay
