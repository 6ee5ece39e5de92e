"""The loss of a batch; if the head is frozen and plain, without the logits of the batch.

The model then runs with its head's forward replaced by the identity, so it returns hidden states in place of logits,
and the loss applies the head to chunks of the rows that have a label (`ops.chunked_cross_entropy`). A probe finds out
whether a model does anything else with its logits (soft-capping, a scale, slices); no list of families is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_kit.data.batches import IGNORE_INDEX
from lora_kit.errors import VerificationError
from lora_kit.evaluation.label_loss import LabelLoss
from lora_kit.layers.introspect import reason_black_box
from lora_kit.models.tasks import GENERATIVE_KINDS, NEXT
from lora_kit.ops.cross_entropy import chunked_cross_entropy
from lora_kit.torch_utils import use_eval_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LossHead:
    """How the loss of a model is computed.

    Attributes:
        linear: the head that is left out of the forward; None if the loss needs the model's own logits.
        reason: why the loss needs them; None if it does not.
        label_shift: distance from the position that predicts a label to the label: 1 where a text continues; 0 where
            each position has its own label, as a word has, or where the decoder's inputs are shifted already.
        label_loss: the loss of labels that are no tokens; None where they are.
    """

    linear: nn.Linear | None
    reason: str | None = None
    label_shift: int = 1
    label_loss: LabelLoss | None = None

    @contextlib.contextmanager
    def skip(self) -> Iterator[None]:
        """Make the model return the hidden states before its head in place of logits, if the loss does not need them.

        The model is as before after the block.
        """
        with contextlib.nullcontext() if self.linear is None else _replace_forward(self.linear, lambda states: states):
            yield

    def loss(self, outputs: Tensor, labels: Tensor, *, weights: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
        """Return the negative log-likelihood of the labels in nats, summed: () in fp32.

        For sets of labels and for numbers it is the loss of `LabelLoss`.

        Positions without a label are dropped first.

        Args:
            outputs: what the model returned as logits within `skip`: (rows, length, d or vocabulary) with labels
                (rows, length), or (rows, classes) with labels of whole texts.
            labels: int64, `IGNORE_INDEX` at positions without one; of whole texts as a `Collator` returns them.
            weights: of samples whose labels are no tokens: float32 (rows,).
            smoothing: share of the target spread evenly over all classes (Szegedy et al. 2015, arXiv 1512.00567).

        Raises:
            VerificationError: the model did not use its head as in the probe.
        """
        if self.label_loss is not None:
            return self.label_loss.sum(outputs, labels, weights, smoothing=smoothing)
        labels = functional.pad(labels[:, self.label_shift :], (0, self.label_shift), value=IGNORE_INDEX)
        if self.linear is None:
            has_label = labels != IGNORE_INDEX
            logits = outputs[has_label].float()
            return functional.cross_entropy(logits, labels[has_label], reduction="sum", label_smoothing=smoothing)
        if outputs.shape[-1] != self.linear.in_features:
            shape = tuple(outputs.shape)
            raise VerificationError(f"the model did not use its head as in the probe: it returned {shape}")
        if not torch.is_autocast_enabled(outputs.device.type):
            outputs = outputs.to(self.linear.weight.dtype)  # a model may cast its logits up
        return chunked_cross_entropy(
            outputs.flatten(0, 1),
            self.linear.weight,
            labels.flatten(),
            bias=self.linear.bias,
            ignore_index=IGNORE_INDEX,
            smoothing=smoothing,
        )


def probe_head(
    model: PreTrainedModel, sample: Mapping[str, Tensor], *, kind: str = NEXT, class_weights: Sequence[float] = ()
) -> LossHead:
    """Find out by one forward of a sample how the loss of a model is to be computed; the model is left as it was.

    The head is left out if it is a plain linear layer, frozen (or no gradient is needed), and the model returns as
    logits what its head returns, at most in a wider dtype.

    Args:
        sample: inputs of the model, on its device: `input_ids` (rows, length) and so on, without labels.
        kind: kind of the samples; the head can be left out only if the labels are tokens to be written.
        class_weights: of labels that are no tokens.
    """
    label_shift = int(kind == NEXT)
    if kind not in GENERATIVE_KINDS:
        return LossHead(None, "labels are not tokens", label_shift, LabelLoss(kind, class_weights))
    sample = {name: tensor[:, :2] for name, tensor in sample.items()}
    head = model.get_output_embeddings()
    reason = _reason_not_plain(head)
    if reason is None and isinstance(head, nn.Linear):
        reason = _reason_not_logits_only(model, head, sample)
    return LossHead(head if reason is None else None, reason, label_shift)


def _reason_not_plain(head: nn.Module | None) -> str | None:
    """Return why a head cannot be applied in chunks, or None if it can."""
    if type(head) is not nn.Linear:
        return "the model has no head" if head is None else f"the head is a {type(head).__name__}"
    reason = reason_black_box(head)
    if reason is not None:
        return f"the head {reason}"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in head.parameters()):
        return "the head is trained"
    return None


def _reason_not_logits_only(model: PreTrainedModel, head: nn.Linear, sample: Mapping[str, Tensor]) -> str | None:
    """Return what else a model does with its head than return its output as logits, or None if nothing.

    The probe replaces the head's output by numbers so large that a soft cap would change them.
    """
    calls: list[tuple[Tensor, Tensor]] = []

    def return_ramp(states: Tensor) -> Tensor:
        size = states[..., 0].numel() * head.out_features
        ramp = torch.linspace(-100, 100, size, device=states.device).to(states.dtype)
        logits = ramp.view(*states.shape[:-1], head.out_features)
        calls.append((logits, logits.clone()))  # a copy, since the model may write into its head's output
        return logits

    with use_eval_mode(model), torch.no_grad(), _replace_forward(head, return_ramp):
        outputs = model(**sample, use_cache=False).logits
    if len(calls) != 1:
        return f"the model uses its head {len(calls)} times"
    logits, copy = calls[0]
    if logits.shape[:-1] != sample.get("decoder_input_ids", sample["input_ids"]).shape:
        return "the model passes other positions to its head than its inputs have"
    is_wider = outputs.dtype != logits.dtype and torch.promote_types(outputs.dtype, logits.dtype) == outputs.dtype
    if not (outputs is logits or is_wider) or not torch.equal(outputs, copy.to(outputs.dtype)):
        return "the model changes its logits"
    return None


@contextlib.contextmanager
def _replace_forward(head: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the forward of a head for the length of a block."""
    vars(head)["forward"] = forward
    try:
        yield
    finally:
        del vars(head)["forward"]
