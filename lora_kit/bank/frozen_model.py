"""What a bank changes in its model besides wrapping layers: it freezes parameters, and stops bitsandbytes' packing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from torch import nn

from lora_kit.errors import BankError
from lora_kit.layers.introspect import pause_packing, resume_packing
from lora_kit.layers.slot_layer import SlotLayer

_FLAG: Final = "_lora_kit_bank"
"""Attribute of a model that has a bank, even one that has wrapped no layer yet."""


class FrozenModel:
    """A model that is frozen, and checks its calls, from now on until `release`.

    Args:
        model: the base.
        check: called before each forward with the model, its arguments and its keyword arguments.
    """

    def __init__(self, model: nn.Module, check: Callable[..., None]) -> None:
        self._model = model
        self._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._paused_layers = pause_packing(model)
        self._check = model.register_forward_pre_hook(check, with_kwargs=True)
        model.__dict__[_FLAG] = True

    def unfreeze(self) -> None:
        """Let the parameters that were frozen require grad again."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen.clear()

    def check_attached(self) -> None:
        """Raise BankError after `release`."""
        if not self.is_attached:
            raise BankError("this bank was detached already")

    @property
    def is_attached(self) -> bool:
        return _FLAG in self._model.__dict__

    def release(self) -> None:
        """Undo everything."""
        del self._model.__dict__[_FLAG]
        self._check.remove()
        resume_packing(self._paused_layers)
        self.unfreeze()


def has_bank(model: nn.Module) -> bool:
    """Return whether a model has a bank."""
    return _FLAG in model.__dict__ or any(isinstance(module, SlotLayer) for module in model.modules())
