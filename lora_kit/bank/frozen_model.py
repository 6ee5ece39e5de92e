"""What a bank changes in its model besides wrapping layers: it freezes parameters, and stops bitsandbytes' packing."""

from __future__ import annotations

from typing import Final

from torch import nn

from lora_kit.errors import BankError, format_list
from lora_kit.layers.introspect import pause_packing, resume_packing
from lora_kit.layers.slot_layer import SlotLayer, offload_device_of

_FLAG: Final = "_lora_kit_bank"
"""Attribute of a model that has a bank, even one that has wrapped no layer yet."""


class FrozenModel:
    """A model that is frozen from now on until `release`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._paused_layers = pause_packing(model)
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
        resume_packing(self._paused_layers)
        self.unfreeze()


def has_bank(model: nn.Module) -> bool:
    """Return whether a model has a bank."""
    return _FLAG in model.__dict__ or any(isinstance(module, SlotLayer) for module in model.modules())


def refuse_meta_model(model: nn.Module) -> None:
    """Raise BankError for a model with weights on meta, except those that accelerate loads layer by layer."""
    paths = [path or type(model).__name__ for path, module in model.named_modules() if _is_left_on_meta(module)]
    if paths:
        raise BankError(
            f"these modules have no weights, they are on meta: {format_list(paths)}",
            hint="load the weights first; to offload them, accelerate must do so layer by layer, not in whole blocks",
        )


def _is_left_on_meta(module: nn.Module) -> bool:
    own = (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None and tensor.is_meta for tensor in own) and offload_device_of(module) is None
