"""Rows of different adapters through a module that is a black box: the rows of each adapter by themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from lora_kit.errors import RoutingError
from lora_kit.layers.slot_layer import SlotLayer


def forward_each_slot(
    layer: SlotLayer,
    slots: Sequence[int],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    forward: Callable[[int, tuple[Tensor, ...]], object],
) -> object:
    """Compute the rows of each slot by themselves, and return the outputs in the order of the batch.

    Args:
        layer: around the module.
        slots: of each of R rows.
        args: tensors (n, ...), where n is a multiple of R. kwargs: must be empty.
        forward: from a slot and its part of args, to a tensor or a tuple of tensors with as many entries.

    Raises:
        RoutingError: the module was called with something other than such tensors, or these cannot be split into the
            rows.
    """
    if kwargs or not _is_batch(args):
        module = type(layer.base_layer).__name__
        raise RoutingError(
            f"a {module} that takes more than tensors of tokens cannot serve rows of different adapters",
            hint="use() one adapter at a time",
        )
    layer.routing.check_rows(layer.routing.get_route(), args[0], layer)
    slot_of = torch.tensor(slots).repeat_interleave(args[0].shape[0] // len(slots))
    parts, order = list[object](), list[Tensor]()
    for slot in sorted(set(slots)):
        indices = (slot_of == slot).nonzero().squeeze(1)
        parts.append(forward(slot, tuple(x.index_select(0, indices.to(x.device)) for x in args)))
        order.append(indices)
    return _join_outputs(parts, torch.cat(order).argsort())


def _is_batch(args: tuple[object, ...]) -> TypeGuard[tuple[Tensor, ...]]:
    """Return whether these are tensors with the same number of entries."""
    tensors = [x for x in args if isinstance(x, Tensor) and x.ndim]
    return bool(args) and len(tensors) == len(args) and len({x.shape[0] for x in tensors}) == 1


def _join_outputs(parts: Sequence[object], order: Tensor) -> object:
    """Return the outputs of parts of a batch in the order of the whole: a tensor, or a tuple of tensors."""
    if isinstance(parts[0], tuple):
        return tuple(_join_outputs(each, order) for each in zip(*parts, strict=True))
    joined = torch.cat([part for part in parts if isinstance(part, Tensor)])
    return joined.index_select(0, order.to(joined.device))
