"""The base of a bank as a model of its own: what preference training compares the adapter with."""

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
    """The base model as it was before adapters, computed by the model that has them. Made by `bank.reference()`.

    A call is a call of the model without an adapter, without dropout and without a gradient; afterwards everything is
    as it was. Nothing is copied: it has no parameters of its own, so nothing can train it, move it or save it twice.
    Whatever another library puts in the place of `forward` runs under the same conditions.
    """

    def __init__(self, bank: AdapterBank) -> None:
        super().__init__()
        model: Any = bank.model
        if hasattr(model, "get_output_embeddings") and isinstance(model.get_output_embeddings(), SlotLayer):
            # They multiply hidden states by its weight, past any adapter: the head would silently not be trained.
            raise BankError(
                "an adapter covers the head, which trainers of preferences use without its adapter",
                hint="leave the head out of target_modules and modules_to_save",
            )
        self._bank = bank
        self.eval()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Not in forward, which TRL replaces by one that calls parts of the model.
        with torch.no_grad(), use_eval_mode(self._bank.model), self._bank.using(None):
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._bank.model(*args, **kwargs)

    # What trainers ask of a model

    @property
    def config(self) -> Any:
        return self._bank.model.config

    @property
    def device(self) -> torch.device:
        return next(self._bank.model.parameters()).device

    @property
    def base_model(self) -> Any:
        return self._bank.model.base_model

    def get_output_embeddings(self) -> Any:
        model: Any = self._bank.model
        return model.get_output_embeddings()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's: TRL tells by it whether what it has computed once still holds."""
        return self._bank.model.state_dict(*args, **kwargs)
