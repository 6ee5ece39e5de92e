"""Gradients of several processes summed at once, in one flat tensor for each dtype and device.

An adapter is small: one sum of all that is trained costs less than many, and a process may have done any number of
forwards before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def sum_gradients(
    parameters: Sequence[nn.Parameter], notes: Sequence[Tensor], *, all_reduce: Callable[[Tensor], object]
) -> list[Tensor]:
    """Replace every gradient by its sum over all processes; a gradient that no process has stays None.

    Args:
        parameters: the same in all processes; a gradient of None counts as zero.
        notes: numbers to be summed as well: fp32 ().
        all_reduce: replaces a tensor by its sum over all processes, in place.

    Returns:
        The sums of the notes: fp32 () each.
    """
    device = parameters[0].device
    counts = torch.tensor([float(leaf.grad is not None) for leaf in parameters], device=device)
    extra = torch.cat([counts, torch.stack([note.to(device, torch.float32) for note in notes])])
    sums = extra
    for (dtype, _), leaves in _group_leaves(parameters).items():
        # What is summed besides the gradients goes with the first that can hold it.
        tail = [extra] if dtype == torch.float32 and sums is extra else []
        flat = torch.cat([*(_flatten_gradient(leaf) for leaf in leaves), *(part.to(leaves[0].device) for part in tail)])
        all_reduce(flat)
        for leaf, part in _split_flat(flat, leaves):
            leaf.grad = part if leaf.grad is None else leaf.grad.copy_(part)
        if tail:
            sums = flat[-len(extra) :].to(device)
    if sums is extra:
        all_reduce(extra)
    _drop_missing(parameters, sums[: len(parameters)])
    return list(sums[len(parameters) :].unbind())


def _group_leaves(parameters: Sequence[nn.Parameter]) -> Mapping[tuple[torch.dtype, torch.device], list[nn.Parameter]]:
    groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for leaf in parameters:
        groups.setdefault((leaf.dtype, leaf.device), []).append(leaf)
    return groups


def _flatten_gradient(leaf: nn.Parameter) -> Tensor:
    return torch.zeros_like(leaf).reshape(-1) if leaf.grad is None else leaf.grad.reshape(-1)


def _split_flat(flat: Tensor, leaves: Sequence[nn.Parameter]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    sizes = [leaf.numel() for leaf in leaves]
    for leaf, part in zip(leaves, flat[: sum(sizes)].split(sizes), strict=True):
        yield leaf, part.view(leaf.shape)


def _drop_missing(parameters: Sequence[nn.Parameter], counts: Tensor) -> None:
    """Set the gradients to None that no process had: an optimizer passes over these, and not over zeros."""
    if not all(counts.tolist()):
        for leaf, count in zip(parameters, counts.tolist(), strict=True):
            if not count:
                leaf.grad = None
