"""The loss of a batch; where the head is frozen and plain, without the logits of the batch.

A model then runs with a stand-in in place of its head's forward, which hands the states through, and the loss takes the
head in chunks of the rows that have a label (`ops.chunked_cross_entropy`). Nothing is known about families of models:
whether one does anything else with its logits (soft-capping, a scale, slices) is found out by a probe.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_kit.data.batches import GENERATIVE_KINDS, IGNORE_INDEX, NEXT
from lora_kit.errors import VerificationError
from lora_kit.layers.introspect import reason_black_box
from lora_kit.ops.cross_entropy import chunked_cross_entropy
from lora_kit.torch_utils import use_eval_mode


@dataclass(frozen=True)
class LossHead:
    """How a model's loss is taken.

    Attributes:
        linear: the head that is left out of the forward; None where the loss is taken from the model's own logits.
        reason: why they are needed; empty where they are not.
        ahead: how many positions after the one it is predicted from a label stands: 1 where text goes on, 0 where each
            position has its own label, as a word has, or where a decoder was given its labels shifted.
    """

    linear: nn.Linear | None
    reason: str = ""
    label_shift: int = 1

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Within, the model gives the states before its head for logits, if it can do without them."""
        with contextlib.nullcontext() if self.linear is None else _replace_forward(self.linear, lambda states: states):
            yield

    def loss(self, given: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """The negative log-likelihood of the labels in nats, summed: () in fp32.

        Positions without a label are dropped first.

        Args:
            given: what the model gave for logits within `left_out`: (rows, length, d or vocabulary) with labels
                (rows, length), or (rows, classes) with labels (rows,).
            smoothing: share of the target spread evenly over all classes (Szegedy et al. 2015, arXiv 1512.00567).
        """
        if labels.ndim == 1:
            return functional.cross_entropy(given.float(), labels, reduction="sum", label_smoothing=smoothing)
        labels = functional.pad(labels[:, self.label_shift :], (0, self.label_shift), value=IGNORE_INDEX)
        if self.linear is None:
            kept = labels != IGNORE_INDEX
            logits = given[kept].float()
            return functional.cross_entropy(logits, labels[kept], reduction="sum", label_smoothing=smoothing)
        if given.shape[-1] != self.linear.in_features:
            raise VerificationError(f"the model did not use its head as in the probe: it gave {tuple(given.shape)}")
        if not torch.is_autocast_enabled(given.device.type):
            given = given.to(self.linear.weight.dtype)  # a model may cast its logits up
        return chunked_cross_entropy(
            given.flatten(0, 1),
            self.linear.weight,
            labels.flatten(),
            bias=self.linear.bias,
            ignore_index=IGNORE_INDEX,
            smoothing=smoothing,
        )


def probe_head(model: Any, sample: Mapping[str, Tensor], *, kind: str = NEXT) -> LossHead:
    """How the loss of this model is to be taken, found out by one forward of a sample; the model is as it was.

    The head is left out where it is a plain linear layer, frozen (or no gradient is wanted), and the model gives for
    logits what its head gives, cast up at the most.

    Args:
        sample: what the model takes, on its device: `input_ids` (rows, length) and so on, without labels.
        kind: of the samples; only where tokens are written can the head be left out.
    """
    ahead = int(kind == NEXT)
    if kind not in GENERATIVE_KINDS:
        return LossHead(None, "labels are no tokens", ahead)
    sample = {name: tensor[:, :2] for name, tensor in sample.items()}
    linear: Any = model.get_output_embeddings()
    reason = _reason_not_plain(linear) or _reason_not_logits_only(model, linear, sample)
    return LossHead(None if reason else linear, reason, ahead)


def _reason_not_plain(head: Any) -> str:
    """What keeps a head from being taken in chunks; empty for nothing."""
    if type(head) is not nn.Linear:
        return "the model has no head" if head is None else f"the head is a {type(head).__name__}"
    reason = reason_black_box(head)
    if reason is not None:
        return f"the head {reason}"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in head.parameters()):
        return "the head is trained"
    return ""


def _reason_not_logits_only(model: Any, head: nn.Linear, sample: Mapping[str, Tensor]) -> str:
    """What a model does with its head besides giving its output for logits; empty for nothing.

    The head's output is made up here: numbers so large that a soft cap cannot leave them as they are.
    """
    made: list[tuple[Tensor, Tensor]] = []

    def stand_in(states: Tensor) -> Tensor:
        size = states[..., 0].numel() * head.out_features
        ramp = torch.linspace(-100, 100, size, device=states.device).to(states.dtype)
        logits = ramp.view(*states.shape[:-1], head.out_features)
        made.append((logits, logits.clone()))  # a copy, since the model may write into what its head gives
        return logits

    with use_eval_mode(model), torch.no_grad(), _replace_forward(head, stand_in):
        given = model(**sample, use_cache=False).logits
    if len(made) != 1:
        return f"the model uses its head {len(made)} times"
    logits, copy = made[0]
    if logits.shape[:-1] != sample.get("decoder_input_ids", sample["input_ids"]).shape:
        return "the model gives its head other positions than it was given"
    cast_up = given.dtype != logits.dtype and torch.promote_types(given.dtype, logits.dtype) == given.dtype
    if not (given is logits or cast_up) or not torch.equal(given, copy.to(given.dtype)):
        return "the model does something to its logits"
    return ""


@contextlib.contextmanager
def _replace_forward(head: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Another forward for a head, whatever happens within."""
    vars(head)["forward"] = forward
    try:
        yield
    finally:
        del vars(head)["forward"]
