"""How much memory a training needs, from the config of a base alone: whole steps on tensors without memory, counted.

The model, the bank, the loss and the optimizer are those of a training; the numbers are missing (`FakeTensorMode`).
Attention has a mask, as it has in a batch of unlike lengths. What is not counted: what a kernel uses inside itself, and
what the device's driver and allocator take.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from lora_kit.bank.attach import attach
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import BaseModelError
from lora_kit.evaluation.loss import LossHead
from lora_kit.models.tasks import GENERATIVE_KINDS, SEQ2SEQ, TARGET, TASK_SPECS
from lora_kit.ops.cross_entropy import choose_chunk, sum_row_losses
from lora_kit.training.loop.contexts import find_repeated_layers, start_gradient_checkpointing
from lora_kit.training.plan.live_bytes import LiveBytes, TooManyOperationsError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FULL: Final = "full"
QLORA: Final = "qlora"
SIZED_METHODS: Final = ("lora", QLORA, FULL)
_ADAPTER: Final = "sized"
_STEPS: Final = 2
"""Steps that are counted: in the second one the state of the optimizer is there."""
_MOST_OPERATIONS: Final = 400_000
"""Of all steps together: minutes. Llama of 405 billion weights, with its 126 layers, has half as many."""
_BLOCK: Final = 64
"""Weights that share a scale in 4 bits, which is kept in fp32."""


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What is trained, and how much of it at once.

    Attributes:
        method: `lora`, `qlora` (the base in NF4) or `full`.
        task: of the model.
        lora: rank and targets of the adapter; of no meaning for `full`.
        dtype: of the frozen weights; every weight of `full` is trained in fp32. Products are in bf16 unless it is fp32.
        rows: of a forward.
        length: tokens of each.
        checkpointing: whether layers are computed again in the backward.
        device: type of the device, which decides how many logits exist at once.
    """

    method: str
    task: str
    lora: LoraConfig
    dtype: torch.dtype = torch.bfloat16
    rows: int = 1
    length: int = 2048
    checkpointing: bool = False
    device: str = "cuda"


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """Bytes of a training on one device, and the work of a step.

    Attributes:
        parameters: elements of the base.
        trainable: elements that are trained.
        weights: of the frozen base, packed for `qlora`; 0 for `full`.
        layers: those of `weights` that are in the model's repeated layers.
        largest_layer: of one of these.
        trained: trained tensors, their gradients and the state of AdamW.
        activations: all else at the peak: what the backward needs, and temporary tensors.
        flops: multiplications and additions of a step's products.
    """

    parameters: int
    trainable: int
    weights: int
    layers: int
    largest_layer: int
    trained: int
    activations: int
    flops: int

    @property
    def total(self) -> int:
        """The most that is alive at once on one device that has everything."""
        return self.weights + self.trained + self.activations

    def shard(self, processes: int) -> StepSize:
        """Return the size on one of several devices that share the frozen base (`train.fsdp: full_shard`).

        Each has its part, two layers that are gathered, and what is outside the layers. The adapter is on all of them.
        """
        outside = self.weights - self.layers
        weights = self.layers // processes + 2 * self.largest_layer + outside
        return dataclasses.replace(self, weights=min(weights, self.weights))


def measure_step_size(config: PretrainedConfig, shape: StepShape) -> StepSize:
    """Count what a training needs. No weight is read, and no memory is taken for one.

    Raises:
        TargetError: the adapter's config does not match the model.
        BaseModelError: the model has no repeated layers, or a step has too many operations.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _build_model(config, shape)
        packed = _Packing.of(model) if shape.method == QLORA else _Packing()
        layers = [sum(map(_count_bytes, layer.parameters())) for layer in find_repeated_layers(model)]
        weights = sum(_count_bytes(tensor) for tensor in {*model.parameters(), *model.buffers()})
        parameters = sum(parameter.numel() for parameter in model.parameters())
        leaves = _make_trainable(model, shape)
        live = LiveBytes(most_operations=_MOST_OPERATIONS)
        for tensor in (*model.parameters(), *model.buffers()):
            live.add(tensor)
        try:
            _run_steps(model, leaves, shape, live)
        except TooManyOperationsError:
            what = f"a step on rows of {shape.length:,} tokens has more than {_MOST_OPERATIONS // _STEPS:,} operations"
            why = "as in layers that go through a row token by token, so it would take hours to count"
            hint = "a smaller --length; or train --dry-run, which measures a step"
            raise BaseModelError(f"{what}, {why}", hint=hint) from None
        trained = sum(4 * _count_bytes(leaf) for leaf in leaves)  # with gradients and the two moments of AdamW
        frozen = 0 if shape.method == FULL else weights
        share = packed.saved / max(1, sum(layers))
        return StepSize(
            parameters=parameters,
            trainable=sum(leaf.numel() for leaf in leaves),
            weights=max(0, frozen - packed.saved),
            layers=int(sum(layers) * (1 - share)),
            largest_layer=int(max(layers) * (1 - share)),
            trained=trained,
            activations=live.peak - frozen - trained + packed.largest,
            flops=live.flops // _STEPS,
        )


def _count_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True)
class _Packing:
    """What NF4 changes: a weight has half a byte and a part of a scale, and a layer is unpacked where it is used.

    Attributes:
        saved: bytes that the packed layers take less.
        largest: bytes of the largest layer as it is unpacked.
    """

    saved: int = 0
    largest: int = 0

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Packing:
        """Return that of the linear layers that bitsandbytes packs: all but the head."""
        head = model.get_output_embeddings()
        weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        saved = sum(_count_bytes(weight) - weight.numel() // 2 - weight.numel() // _BLOCK * 4 for weight in weights)
        return cls(saved, max(map(_count_bytes, weights), default=0))


def _build_model(config: PretrainedConfig, shape: StepShape) -> PreTrainedModel:
    import transformers

    auto_class = getattr(transformers, TASK_SPECS[shape.task].auto_class)
    dtype = torch.float32 if shape.method == FULL else shape.dtype
    model: PreTrainedModel = auto_class.from_config(config, dtype=dtype, trust_remote_code=False)
    if shape.checkpointing:
        start_gradient_checkpointing(model)
    return model.train()


def _make_trainable(model: PreTrainedModel, shape: StepShape) -> list[nn.Parameter]:
    if shape.method == FULL:
        return list(model.parameters())
    return attach(model, shape.lora, name=_ADAPTER).parameters(_ADAPTER)


def _run_steps(model: PreTrainedModel, leaves: list[nn.Parameter], shape: StepShape, live: LiveBytes) -> None:
    """Run steps as `lora_kit.training.loop.trainer` does, and count them."""
    optimizer = torch.optim.AdamW(leaves)
    compute = torch.autocast("cpu", torch.bfloat16, enabled=shape.dtype != torch.float32)
    with live:
        for _ in range(_STEPS):
            with compute:
                loss = _compute_loss(model, shape)
            loss.backward()
            del loss  # whose graph holds the inputs of checkpointed layers
            torch.nn.utils.clip_grad_norm_(leaves, 1.0)
            optimizer.step()
            optimizer.zero_grad()


def _compute_loss(model: PreTrainedModel, shape: StepShape) -> Tensor:
    """Return the loss of a batch in which every token that may have a label has one."""
    kind = TASK_SPECS[shape.task].sample_kind
    ids = torch.zeros(shape.rows, shape.length, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if shape.task == SEQ2SEQ:
        inputs["decoder_input_ids"] = torch.zeros_like(ids)
    if kind not in GENERATIVE_KINDS:
        logits = model(**inputs).logits.flatten(0, -2).float()
        return functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))
    head = model.get_output_embeddings()
    is_frozen = isinstance(head, nn.Linear) and not any(tensor.requires_grad for tensor in head.parameters())
    with LossHead(head if is_frozen else None).skip():
        states = model(**inputs, use_cache=False).logits.flatten(0, 1)
    rows = torch.arange(len(states) - (0 if kind == TARGET else shape.rows))
    labels = torch.zeros_like(rows)
    if not is_frozen:
        return functional.cross_entropy(states[rows].float(), labels)
    chunk = choose_chunk(states, len(head.weight), device=shape.device)
    return sum_row_losses(states, head.weight, labels, rows, bias=head.bias, chunk=chunk) / len(rows)
