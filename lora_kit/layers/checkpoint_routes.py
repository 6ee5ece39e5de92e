"""Gradient checkpointing computes parts of a forward again in the backward: with the routes that the forward used.

By then the caller may use another adapter, and on a GPU the backward runs in a thread of autograd's own. torch has no
public place to bring such state along, so the two functions that every form of checkpointing in torch goes through are
wrapped, under every name that modules have for them. torch.compile traces checkpoints itself, and needs none of this.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, Final

from torch.utils import checkpoint

from lora_kit.layers.routing import list_routings

_FORWARD: Final = "forward"
"""Method of `CheckpointFunction`, the reentrant form; its first argument after the context is the function."""
_GENERATOR: Final = "_checkpoint_without_reentrant_generator"
"""Function of the other form; its first argument is the function."""
_INSTALLED: Final = "_lora_kit_routes"
"""Attribute of a function of torch that is wrapped."""


def install_checkpoint_routes() -> None:
    """Let recomputations of gradient checkpointing, from now on, use the routes of their forwards.

    Raises:
        AttributeError: this version of torch has other functions.
    """
    forward: Callable[..., object] = checkpoint.CheckpointFunction.forward
    generate: Callable[..., Iterator[None]] = getattr(checkpoint, _GENERATOR)
    if hasattr(forward, _INSTALLED):
        return

    @wraps(forward)
    def forward_with_routes(ctx: object, function: Callable[..., object], *args: object) -> Any:
        return forward(ctx, keep_routes(function), *args)

    @wraps(generate)
    def generate_with_routes(function: Callable[..., object], *args: object, **kwargs: object) -> Any:
        return generate(keep_routes(function), *args, **kwargs)

    for wrapper in (forward_with_routes, generate_with_routes):
        setattr(wrapper, _INSTALLED, True)
    setattr(checkpoint.CheckpointFunction, _FORWARD, staticmethod(forward_with_routes))
    _replace_in_modules(generate, generate_with_routes)


def _replace_in_modules(function: object, wrapper: object) -> None:
    """Put a wrapper in the place of a function, in its own module and in those that imported it by name."""
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is function:
                setattr(module, name, wrapper)


def keep_routes(function: Callable[..., object]) -> Callable[..., object]:
    """Return a function that does the same with the routes that the caller uses now, whoever calls it and when."""
    saved = [(routing, *routing.save_forward()) for routing in list_routings()]
    if not saved:
        return function

    def function_with_routes(*args: object, **kwargs: object) -> object:
        with contextlib.ExitStack() as stack:
            for routing, route, forward in saved:
                stack.enter_context(routing.repeat_forward(route, forward))
            return function(*args, **kwargs)

    return function_with_routes
