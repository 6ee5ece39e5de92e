"""An estimate of the memory of a training: tensors that exist are counted, what a forward keeps is measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_kit.training.loop.contexts import stop_gradient_checkpointing
from lora_kit.training.loop.training_loop import TrainingLoop


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory in bytes.

    Attributes:
        weights: of the model, as they are stored, quantized or not.
        trained: trained tensors of the adapter: lora_A, lora_B and `modules_to_save`; 0 where every weight is trained.
        gradients: of the trained tensors.
        optimizer: the optimizer's state after a step.
        activations: what autograd keeps of a forward for the backward if every row were as long as the longest,
            extrapolated from forwards of one and of two such rows. With gradient checkpointing: the inputs of all
            layers, and what one layer keeps. Temporary tensors come on top.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.trained + self.gradients + self.optimizer + self.activations


def estimate_memory(trainer: TrainingLoop, longest: dict[str, Tensor], *, rows: int) -> MemoryEstimate:
    """Return the memory that a training needs, measured after one step of it. Turns gradient checkpointing off.

    Args:
        longest: the longest row.
        rows: rows of a forward pass.
    """
    model = trainer.model
    tensors = _measure_storages([*model.parameters(), *model.buffers()])
    leaves: list[Tensor] = [tensor for tensor in model.parameters() if tensor.requires_grad]
    trained = _measure_storages(leaves)
    is_full = len(leaves) == len(list(model.parameters()))
    assert trainer.optimizer is not None
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    return MemoryEstimate(
        weights=sum(size for address, size in tensors.items() if is_full or address not in trained),
        trained=0 if is_full else sum(trained.values()),
        gradients=sum(tensor.numel() * tensor.element_size() for tensor in leaves),
        optimizer=sum(_measure_storages([value for value in states if isinstance(value, Tensor)]).values()),
        activations=_estimate_activations(trainer, longest, rows, set(tensors)),
    )


def _measure_storages(tensors: list[Tensor]) -> dict[int, int]:
    """Return the bytes of each storage by its address: once, where tied weights or stacked LoRA weights share one."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def _estimate_activations(trainer: TrainingLoop, longest: dict[str, Tensor], rows: int, weights: set[int]) -> int:
    """Return the bytes that a micro-batch keeps: those of one row, and what each further row adds.

    The difference of two rows and one leaves out what does not depend on their number, as casts of weights.
    """
    trainer.model.train()
    layers = stop_gradient_checkpointing(trainer.model)
    one = _measure_saved_tensors([longest], trainer, layers, weights)
    if rows == 1:
        return one
    return one + (rows - 1) * (_measure_saved_tensors([longest] * 2, trainer, layers, weights) - one)


def _measure_saved_tensors(
    rows: list[dict[str, Tensor]], trainer: TrainingLoop, layers: list[nn.Module], weights: set[int]
) -> int:
    """Return the bytes that the forward of some rows keeps for its backward, besides weights.

    Args:
        layers: checkpointed layers, which keep their input, and all else of one layer at a time; empty without
            gradient checkpointing.
        weights: addresses of the storages of weights.
    """
    saved, inputs = dict[int, int](), dict[int, int]()

    def save(tensor: Tensor) -> Tensor:
        saved.update({address: size for address, size in _measure_storages([tensor]).items() if address not in weights})
        return tensor

    def measure_inputs(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        states = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.requires_grad]
        inputs.update(_measure_storages(states))

    hooks = [layer.register_forward_pre_hook(measure_inputs, with_kwargs=True) for layer in layers]
    try:
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            loss = trainer.compute_sample_loss(rows)
    finally:
        for hook in hooks:
            hook.remove()
    del loss
    return sum(inputs.values()) + sum(saved.values()) // max(1, len(layers))
