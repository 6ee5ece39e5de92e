"""What takes the place of a model's body while its adapter is trained with others: it asks for the joint forward."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import torch
from torch import Tensor, nn

from lora_kit.training.together.process_state import RandomStream

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped]

_INPUTS: Final = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
"""Inputs of a body that a joint forward takes."""
_IGNORED: Final = frozenset({"num_items_in_batch"})
"""Inputs that a body passes on to nothing: it is the loss that divides by them."""
_RESULTS: Final = frozenset({"last_hidden_state", "pooler_output", "past_key_values"})
"""Results of a body that can be given back; the last is of no use in training."""


@dataclass(frozen=True)
class ProbeRequest:
    """Asks whether a joint forward gives what the body gives alone; the answer is why not, or None.

    Attributes:
        inputs: of the body.
        expected: its last hidden states, (rows, length, width).
        stream: the random numbers before it was computed.
        autocast: dtype of autocast; None for none.
    """

    inputs: Mapping[str, Tensor]
    expected: Tensor
    stream: RandomStream
    autocast: torch.dtype | None


@dataclass(frozen=True)
class ForwardRequest:
    """Asks for the last hidden states of a batch, as a leaf that requires grad: (rows, length, width).

    Attributes:
        inputs: of the body.
        autocast: dtype of autocast; None for none.
    """

    inputs: Mapping[str, Tensor]
    autocast: torch.dtype | None


@dataclass(frozen=True)
class BackwardRequest:
    """Asks for the backward of the last forward; there is no answer.

    Attributes:
        gradient: of its result, in its shape.
    """

    gradient: Tensor


JointRequest: TypeAlias = ProbeRequest | ForwardRequest | BackwardRequest
Ask: TypeAlias = Callable[[JointRequest], Any]
"""Asks the driver, and returns its answer once it is this adapter's turn again."""


class BodyStandIn:
    """The forward of a body in a joint training; outside of training steps it is the body's own.

    Args:
        body: of the model of one adapter.
        ask: asks the driver.
        on_alone: called with the reason where the body computes its batches itself after all.
        reason_alone: returns why it must, once the training has begun; None where it need not.
    """

    def __init__(
        self, body: nn.Module, ask: Ask, on_alone: Callable[[str], None], reason_alone: Callable[[], str | None]
    ) -> None:
        self._body, self._ask, self._on_alone, self._reason_alone = body, ask, on_alone, reason_alone
        self._compute_alone = body.forward
        self._parameters = list(inspect.signature(body.forward).parameters)
        self._is_probed, self._is_alone = False, False
        self._leaf: Tensor | None = None
        self._result_type: type[Any] | None = None

    @contextlib.contextmanager
    def install(self, accelerator: Accelerator) -> Iterator[None]:
        """Take the place of the body's forward until the block ends, and follow each backward of a loop's loss."""
        backward = accelerator.backward

        def run_backward(loss: Tensor, **options: Any) -> None:
            backward(loss, **options)
            self._hand_on_gradient()

        vars(self._body)["forward"], vars(accelerator)["backward"] = self, run_backward
        try:
            yield
        finally:
            del vars(self._body)["forward"], vars(accelerator)["backward"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._leaf = None
        if self._is_alone or not (torch.is_grad_enabled() and self._body.training):
            return self._compute_alone(*args, **kwargs)
        given = self._name_arguments(args, kwargs)
        inputs = {name: value for name, value in given.items() if isinstance(value, Tensor) and name not in _IGNORED}
        if not self._is_probed:
            self._is_probed = True
            reason = self._probe(given, inputs)
            if reason is not None:
                self._is_alone = True
                self._on_alone(reason)
                return self._compute_alone(*args, **kwargs)
        assert self._result_type is not None
        leaf = self._leaf = self._ask(ForwardRequest(inputs, _get_autocast_dtype(inputs)))
        pooler = getattr(self._body, "pooler", None)
        pooled = {} if pooler is None else {"pooler_output": pooler(leaf)}
        return self._result_type(last_hidden_state=leaf, **pooled)

    def _hand_on_gradient(self) -> None:
        """Hand on the gradient of the last hidden states, once the loss has been differentiated."""
        leaf, self._leaf = self._leaf, None
        if leaf is not None and leaf.grad is not None:
            self._ask(BackwardRequest(leaf.grad))

    def _name_arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self._parameters, args, strict=False)), **kwargs}

    def _probe(self, given: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> str | None:
        """Return why the body must compute its batches itself; None where a joint forward gives the same."""
        reason = self._reason_alone()
        if reason is not None:
            return reason
        if "input_ids" not in inputs or set(inputs) - set(_INPUTS):
            return "its body is given more than tokens"
        stream = RandomStream.capture()
        with torch.no_grad():
            result = self._compute_alone(**given)
        stream.copy().restore()
        if not hasattr(result, "last_hidden_state"):
            return "its body does not return hidden states"
        more = {name for name, value in result.items() if value is not None} - _RESULTS
        if more:
            return f"its body also returns {', '.join(sorted(more))}"
        self._result_type = type(result)
        autocast = _get_autocast_dtype(inputs)
        return cast("str | None", self._ask(ProbeRequest(inputs, result.last_hidden_state, stream, autocast)))


def _get_autocast_dtype(inputs: Mapping[str, Tensor]) -> torch.dtype | None:
    kind = inputs["input_ids"].device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
