"""Compiled code reads its route from the thread; when it is entered, that has to be the route of the caller's context.

torch.compile cannot trace context variables. Tasks that take turns in a thread, and functions that run in a thread of a
pool, bring their own context with them, so what the thread used last is not theirs. torch calls one function whenever
compiled code is entered, whichever form of `torch.compile` made it: it is wrapped. It is private, so a test calls every
form.
"""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any, Final

from lora_kit.layers.routing import list_routings

_MODULE: Final = "torch._dynamo.eval_frame"
_FUNCTION: Final = "_callback_from_stance"
"""Called by the wrapper that torch.compile puts around a function, before it looks for compiled code."""
_done: Final[list[bool]] = []
"""Not empty once it is wrapped."""


def install_compiled_routes() -> None:
    """Let compiled code, from now on, use the routes of the context that enters it. Nothing is imported for this.

    Raises:
        AttributeError: this version of torch has no such function.
    """
    if _done:
        return
    module = sys.modules.get(_MODULE)
    if module is None or not hasattr(sys.modules["torch._dynamo"], "eval_frame"):  # absent, or being imported
        return
    get_callback = getattr(module, _FUNCTION)

    @wraps(get_callback)
    def get_callback_with_routes(*args: Any, **kwargs: Any) -> Any:
        for routing in list_routings():
            routing.refresh_thread()
        return get_callback(*args, **kwargs)

    setattr(module, _FUNCTION, get_callback_with_routes)
    _done.append(True)
