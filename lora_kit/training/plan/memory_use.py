"""The memory of a training on its device: steps of it are run, and every tensor that lives in them is counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lora_kit.data.batches import Collator, EncodedDataset
from lora_kit.evaluation.forward import run_forward
from lora_kit.training.loop.trainer import Trainer
from lora_kit.training.loop.training_loop import TrainingLoop
from lora_kit.training.plan.live_bytes import LiveBytes

_TOKENS: Final = 4096
"""Tokens of a forward that is counted, unless three rows have more. All rows would take as long as a step does."""


@dataclass(frozen=True)
class MemoryUse:
    """Memory in bytes, at the moment when most of it is in use.

    Attributes:
        weights: of the model, as they are stored, quantized or not.
        trained: trained tensors of the adapter: lora_A, lora_B and `modules_to_save`; 0 where every weight is trained.
        gradients: of the trained tensors.
        optimizer: the optimizer's state after a step.
        activations: all else in the largest forward and backward that batches of these rows may have: what autograd
            keeps of a forward for the backward, and temporary tensors.
        evaluation: of an evaluation what is not the other parts; it is over when a step begins. 0 without one.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    evaluation: int = 0

    @property
    def total(self) -> int:
        """The most at once: all parts of a step, or those of an evaluation, which has no gradients."""
        return self.weights + self.trained + self.optimizer + max(self.gradients + self.activations, self.evaluation)


def count_memory(trainer: TrainingLoop, samples: list[dict[str, Any]], *, rows: int, length: int) -> MemoryUse:
    """Return the memory that a training needs, counted after one step of it. The trained tensors change.

    Of many long rows only some are run. The difference to half as many tells what each further one adds.

    Args:
        samples: the longest row, and one that is shorter, if there is one: rows of unlike lengths need a mask.
        rows: rows of a forward pass.
        length: tokens of the longest row.
    """
    counted = min(rows, max(3, _TOKENS // length))
    model = trainer.model.train()
    peak = _count_peak(trainer, _make_rows(samples, counted))
    if counted < rows:
        fewer = (counted + 1) // 2
        added = peak - _count_peak(trainer, _make_rows(samples, fewer))
        peak += (rows - counted) * added // (counted - fewer)
    return _divide(max(peak, _count_update(trainer, samples[0])), model, _list_optimizer_tensors(trainer))


def count_evaluation(trainer: Trainer, samples: EncodedDataset, collator: Collator) -> int:
    """Return what one batch of an evaluation needs besides weights and the optimizer's state, counted in bytes."""
    with _count(trainer) as live:
        before = live.now
        run_forward(trainer.model, samples, collator, batch_size=len(samples), autocast=trainer.autocast_dtype)
    return live.peak - before


def _make_rows(samples: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return so many rows: the longest, and the last of several a shorter one."""
    return [*samples[:1] * (count - 1), samples[-1]] if count > 1 else samples[:1]


def _count_peak(trainer: TrainingLoop, samples: list[dict[str, Any]]) -> int:
    """Return the most bytes that are alive in forward and backward of some samples. No gradients are there after it."""
    with _count(trainer) as live:
        if trainer.args.gradient_accumulation_steps > 1:  # then gradients are there already
            trainer.compute_sample_loss(samples[:1]).backward()
        trainer.compute_sample_loss(samples).backward()
    trainer.model.zero_grad()
    return live.peak


def _count_update(trainer: TrainingLoop, sample: dict[str, Any]) -> int:
    """Return the most bytes that are alive while the optimizer updates the weights."""
    assert trainer.optimizer is not None
    trainer.compute_sample_loss([sample]).backward()
    gradients = [tensor.grad for tensor in trainer.model.parameters() if tensor.grad is not None]
    with _count(trainer) as live:
        for gradient in gradients:
            live.add(gradient)
        trainer.optimizer.step()
    trainer.model.zero_grad()
    return live.peak


def _count(trainer: TrainingLoop) -> LiveBytes:
    """Return a count of what is there between two steps, and of what is added while it is entered."""
    live = LiveBytes(trainer.args.device)
    for tensor in (*_list_weights(trainer.model), *_list_optimizer_tensors(trainer)):
        live.add(tensor)
    return live


def _divide(peak: int, model: nn.Module, states: list[Tensor]) -> MemoryUse:
    """Return the parts of a peak."""
    leaves: list[Tensor] = [tensor for tensor in model.parameters() if tensor.requires_grad]
    is_full = len(leaves) == len(list(model.parameters()))
    own = _measure_storages([] if is_full else leaves)
    weights = sum(size for place, size in _measure_storages(_list_weights(model)).items() if place not in own)
    trained, optimizer = sum(own.values()), sum(_measure_storages(states).values())
    gradients = sum(tensor.numel() * tensor.element_size() for tensor in leaves)
    return MemoryUse(
        weights=weights,
        trained=trained,
        gradients=gradients,
        optimizer=optimizer,
        activations=max(0, peak - weights - trained - gradients - optimizer),
    )


def _list_weights(model: nn.Module) -> list[Tensor]:
    """Return parameters, buffers, and the scales of quantized weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return [*tensors, *(scale for tensor in tensors for scale in _iterate_scales(tensor))]


def _iterate_scales(tensor: Tensor) -> Iterator[Tensor]:
    state = getattr(tensor, "quant_state", None)  # in 4 bits, whose scales may be quantized too
    while state is not None:
        yield from (each for each in (state.absmax, state.code, state.offset) if isinstance(each, Tensor))
        state = state.state2
    scale = getattr(tensor, "SCB", None)  # in 8 bits
    if isinstance(scale, Tensor):
        yield scale


def _list_optimizer_tensors(trainer: TrainingLoop) -> list[Tensor]:
    assert trainer.optimizer is not None
    return [leaf for leaf in tree_leaves(list(trainer.optimizer.state.values())) if isinstance(leaf, Tensor)]


def _measure_storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the bytes of each storage by its address: once, where tied weights or stacked LoRA weights share one."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
