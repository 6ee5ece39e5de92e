"""What a bank changes in its model besides wrapping layers: it freezes parameters, and stops bitsandbytes' packing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final
from weakref import WeakSet

from torch import nn

from lora_kit.errors import BankError, format_list
from lora_kit.layers.introspect import pause_packing, resume_packing
from lora_kit.layers.slot_layer import SlotLayer, offload_device_of

_MODELS: Final[WeakSet[nn.Module]] = WeakSet()
"""Models that have a bank, even one that has wrapped no layer yet."""


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
        _MODELS.add(model)

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
        return self._model in _MODELS

    def release(self) -> None:
        """Undo everything."""
        _MODELS.discard(self._model)
        self._check.remove()
        resume_packing(self._paused_layers)
        self.unfreeze()


def check_no_bank(model: nn.Module) -> None:
    """Raise BankError for a model that has a bank, in whole or in part, or is a part of one that has.

    Raises:
        BankError: it is such a model, or a copy of one.
    """
    if model in _MODELS:
        raise BankError("this model has a bank already", hint="add adapters to that one, or detach it first")
    for path, module in model.named_modules():
        if module in _MODELS:
            raise BankError(f"{path} in this model has a bank already", hint="detach that one first")
    for whole in tuple(_MODELS):
        path = next((path for path, module in whole.named_modules() if module is model), None)
        if path is not None:
            raise BankError(
                f"this model is {path} in a {type(whole).__name__} that has a bank already", hint="use that bank"
            )
    if any(isinstance(module, SlotLayer) for module in model.modules()):
        raise BankError(
            "this model is a copy of one that has a bank already, and computes with the adapter that was in use then",
            hint="copy the model before attach, or after detach",
        )


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
