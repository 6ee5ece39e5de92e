"""Whether a batch has a row for each adapter that `rows` named, and which of a call's inputs is the batch.

In a generation, beams and several returned sequences belong to the row they come from, so there a batch may be a
multiple. In another call a multiple is a mistake.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NoReturn

from torch import Tensor

from lora_kit.errors import RoutingError
from lora_kit.layers.route_stack import iterate_frames

GENERATE: Final = "generate"
"""Name of the method of transformers' models that generates."""
INPUT_NAMES: Final = (
    "input_ids",
    "inputs_embeds",
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "input_features",
    "input_values",
    "pixel_values",
    "inputs",
    "encoder_outputs",
)
"""Arguments of transformers' models with one entry per row, those that count first."""


def check_row_count(count: int, batch: Tensor) -> None:
    """Raise RoutingError where a forward's batch has not as many rows as were named, or in a generation a multiple."""
    if batch.shape[0] != count and (batch.shape[0] % count or not _is_generating()):
        _raise_mismatch(count, batch)


def check_prompt_count(count: int, prompts: Tensor) -> None:
    """Raise RoutingError where a generation has not as many prompts as rows were named."""
    if prompts.shape[0] != count:
        _raise_mismatch(count, prompts)


def list_inputs(args: Iterable[object], kwargs: Mapping[str, object]) -> list[Tensor]:
    """Return the tensors of a call's inputs that have a batch, the one that counts first."""
    named = [kwargs[name] for name in INPUT_NAMES if kwargs.get(name) is not None]
    found = [*_iterate_tensors(args), *_iterate_tensors(named)]
    return found or list(_iterate_tensors(kwargs.values()))


def _iterate_tensors(values: Iterable[object]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            if value.ndim:
                yield value
        elif isinstance(value, Mapping):
            yield from _iterate_tensors(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _iterate_tensors(value)


def _raise_mismatch(count: int, batch: Tensor) -> NoReturn:
    raise RoutingError(
        f"{count} rows were routed, but the model was given a batch of {batch.shape[0]}",
        hint="name one adapter per row of the batch",
    )


def _is_generating() -> bool:
    """Return whether the caller was called, however indirectly, by a function that is named `generate`."""
    return any(frame.f_code.co_name == GENERATE for frame in iterate_frames())
