"""The base of a bank, or one of its adapters, as a model of its own: what preference training compares with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_kit.errors import BankError
from lora_kit.layers.slot_layer import SlotLayer
from lora_kit.torch_utils import use_eval_mode

if TYPE_CHECKING:
    from lora_kit.bank.bank import AdapterBank


class ReferenceModel(nn.Module):
    """The base as it was before adapters, or with a fixed one, computed by the model that has them all.

    Made by `bank.reference()`.

    A call is a call of the model without an adapter, or with the fixed one, without dropout and without a gradient;
    afterwards everything is as it was. Nothing is copied: it has no parameters of its own, so nothing can train it,
    move it or save it twice. Whatever another library puts in the place of `forward` runs under the same conditions.
    """

    def __init__(self, bank: AdapterBank, name: str | None = None) -> None:
        super().__init__()
        get_head = getattr(bank.model, "get_output_embeddings", None)
        if get_head is not None and isinstance(get_head(), SlotLayer):
            # They multiply hidden states by its weight and bypass any adapter: the head would silently not be trained.
            raise BankError(
                "an adapter covers the head, which preference trainers use without its adapter",
                hint="leave the head out of target_modules and modules_to_save",
            )
        self._bank, self._name = bank, name
        self.eval()

    def __call__(self, *args: object, **kwargs: object) -> object:
        # Not in forward, which TRL replaces by one that calls parts of the model.
        with torch.no_grad(), use_eval_mode(self._bank.model), self._bank.using(self._name):
            return super().__call__(*args, **kwargs)

    def forward(self, *args: object, **kwargs: object) -> object:
        return self._bank.model(*args, **kwargs)

    # What trainers read of a model

    @property
    def config(self) -> object:
        return self._bank.model.config

    @property
    def device(self) -> torch.device:
        return next(self._bank.model.parameters()).device

    @property
    def base_model(self) -> object:
        return self._bank.model.base_model

    def get_output_embeddings(self) -> object:
        return self._bank.model.get_output_embeddings()  # type: ignore[operator]

    def state_dict(self, *args: object, **kwargs: Any) -> Any:
        """Return the model's: TRL compares it to see whether reference log-probabilities are still valid."""
        return self._bank.model.state_dict(*args, **kwargs)
