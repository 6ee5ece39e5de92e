"""The operations that a piece of work runs, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

FREE = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "detach",
    "alias",
    "slice",
    "select",
    "as_strided",
    "empty",
    "permute",
}
"""Operations that compute nothing: other looks at the same memory."""


class Operations(TorchDispatchMode):
    """Names of the operations that were run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def operations(run: Callable[[], Any]) -> list[str]:
    """Return the names of the operations that `run` runs, in their order."""
    with Operations() as seen:
        run()
    return seen.names
