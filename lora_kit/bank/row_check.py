"""Whether a batch has the rows that were routed, also where all of them go to one adapter and no layer asks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from lora_kit.errors import RoutingError

_INPUT_NAMES: Final = ("input_ids", "inputs_embeds", "decoder_input_ids")
"""Arguments of transformers' models with one entry per row."""


@contextlib.contextmanager
def check_batch_rows(model: nn.Module, rows: int, *, routed: Callable[[], object]) -> Iterator[None]:
    """For the length of a block, a forward of a batch that cannot be split evenly between so many rows is refused.

    Args:
        routed: tells blocks within this one, and what they route, from this one: they have rows of their own.

    Raises:
        RoutingError: in the forward.
    """

    here = routed()

    def check(_: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        # Compiled code is not to be made anew for another number of rows.
        if torch.compiler.is_compiling() or routed() != here:
            return
        batch = next(
            (kwargs[name] for name in _INPUT_NAMES if isinstance(kwargs.get(name), Tensor)), args[0] if args else 0
        )
        if isinstance(batch, Tensor) and batch.ndim and batch.shape[0] % rows:
            raise RoutingError(
                f"{rows} rows were routed, but the model was given a batch of {batch.shape[0]}",
                hint="name one adapter per row of the batch",
            )

    handle = model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
