"""How much memory a training needs, estimated: what is there is counted, what a forward keeps is tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_kit.training.loop.contexts import disable_gradient_checkpointing
from lora_kit.training.loop.trainer import Trainer


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of memory.

    Attributes:
        weights: of the model, frozen ones in the form they are stored in, quantised or not.
        trained: of what is trained: A, B and modules saved whole; counted in `weights` where every weight is trained.
        gradients: one for each trained element.
        optimizer: its states, as they are after a step.
        activations: what autograd keeps of a forward for the backward, if all rows at once were the longest there is:
            counted in forwards of one and of two such rows. With gradient checkpointing: the inputs of all layers, and
            what is kept within one. What is needed only for a moment comes on top.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.gradients + self.optimizer + self.activations


def estimate_memory(trainer: Trainer, longest: dict[str, Tensor], *, rows: int) -> MemoryEstimate:
    """The memory that a training needs, after a step of it. Gradient checkpointing is off afterwards.

    Args:
        longest: the longest row there is.
        rows: through the model at once.
    """
    model: Any = trainer.model
    tensors = _measure_storages([*model.parameters(), *model.buffers()])
    leaves = [tensor for tensor in model.parameters() if tensor.requires_grad]
    trained = _measure_storages(leaves)
    whole = len(leaves) == len(list(model.parameters()))
    assert trainer.optimizer is not None
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    return MemoryEstimate(
        weights=sum(size for place, size in tensors.items() if whole or place not in trained),
        trained=0 if whole else sum(trained.values()),
        gradients=sum(tensor.numel() * tensor.element_size() for tensor in leaves),
        optimizer=sum(_measure_storages([value for value in states if isinstance(value, Tensor)]).values()),
        activations=_estimate_activations(trainer, longest, rows, set(tensors)),
    )


def _measure_storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes of each storage once, by its place: tied weights share one, and so do A and B of a slot and their slab."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def _estimate_activations(trainer: Trainer, longest: dict[str, Tensor], rows: int, weights: set[int]) -> int:
    """Bytes that a micro-batch keeps: of one row, and what each further one adds, casts of weights counted once."""
    model: Any = trainer.model
    model.train()
    layers = disable_gradient_checkpointing(model)
    one = _measure_saved_tensors([longest], trainer, layers, weights)
    return (
        one if rows == 1 else one + (rows - 1) * (_measure_saved_tensors([longest] * 2, trainer, layers, weights) - one)
    )


def _measure_saved_tensors(
    rows: list[dict[str, Tensor]], trainer: Trainer, layers: list[nn.Module], weights: set[int]
) -> int:
    """Bytes that the forward of some rows keeps for its backward, besides weights.

    Args:
        layers: those of which only the input is to be kept, and what is within one of them at a time.
    """
    within, inputs = dict[int, int](), dict[int, int]()

    def save(tensor: Tensor) -> Tensor:
        within.update({place: size for place, size in _measure_storages([tensor]).items() if place not in weights})
        return tensor

    def enter(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        states = [value for value in (*given, *named.values()) if isinstance(value, Tensor) and value.requires_grad]
        inputs.update(_measure_storages(states))

    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    try:
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            loss = trainer.loss_of(rows)
    finally:
        for hook in hooks:
            hook.remove()
    del loss
    return sum(inputs.values()) + sum(within.values()) // len(layers) if layers else sum(within.values())
