"""What a bank changes in its model besides wrapping layers: it freezes parameters, and stops bitsandbytes' packing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from weakref import WeakSet

from torch import nn

from lora_kit.bank.forward_hooks import ForwardHooks, RoutedGenerate, find_parts, remove_copied_hooks
from lora_kit.bank.reference_model import ReferenceModel
from lora_kit.bank.routes import RouteChoices
from lora_kit.errors import BankError, format_list
from lora_kit.layers.introspect import pause_packing, resume_packing
from lora_kit.layers.routing import Routing
from lora_kit.layers.slot_layer import SlotLayer, offload_device_of

_MODELS: Final[WeakSet[nn.Module]] = WeakSet()
"""Models that have a bank, even one that has wrapped no layer yet."""


class FrozenModel:
    """A model that is frozen, and whose calls keep their routes, from now on until `release`.

    Args:
        model: the base.
        routing: of the bank.
        choices: of the bank.
    """

    def __init__(self, model: nn.Module, routing: Routing, choices: RouteChoices) -> None:
        self._model = model
        self._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._paused_layers = pause_packing(model)
        self._hooks = ForwardHooks(routing, is_part=False).register(model)
        part_hooks = ForwardHooks(routing, is_part=True)
        for part in find_parts(model):
            self._hooks += part_hooks.register(part)
        self._generate = RoutedGenerate(model, choices) if callable(getattr(model, "generate", None)) else None
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
        for hook in self._hooks:
            hook.remove()
        if self._generate is not None:
            self._generate.remove()
        resume_packing(self._paused_layers)
        self.unfreeze()


def check_no_bank(model: nn.Module) -> None:
    """Check that no other bank has anything of a model, and forget what a copy of an empty bank's model brought along.

    Raises:
        BankError: it has a bank, or shares modules with a model that has, or is a copy or the reference of one.
    """
    if model in _MODELS:
        raise BankError("this model has a bank already", hint="add adapters to that one, or detach it first")
    for path, module in model.named_modules():
        if module in _MODELS:
            raise BankError(f"{path} in this model has a bank already", hint="detach that one first")
    own = {module: path for path, module in model.named_modules()}
    for whole in tuple(_MODELS):
        shared = {module: path for path, module in whole.named_modules() if module in own}
        if model in shared:
            raise BankError(
                f"this model is {shared[model]} in a {type(whole).__name__} that has a bank already",
                hint="use that bank",
            )
        if shared:
            raise BankError(
                f"this model shares {_name_shared(shared)} with a {type(whole).__name__} that has a bank already",
                hint="attach to a model of its own (copy.deepcopy before the first attach), or detach that bank",
            )
    if any(isinstance(module, ReferenceModel) for module in own):
        raise BankError(
            "this model is the reference of one that has a bank already", hint="add adapters to the bank that made it"
        )
    if any(isinstance(module, SlotLayer) for module in model.modules()):
        raise BankError(
            "this model is a copy of one that has a bank already, and computes with the adapter that was in use then",
            hint="copy the model before attach, or after detach",
        )
    remove_copied_hooks(model)


def _name_shared(shared: Mapping[nn.Module, str]) -> str:
    """Return the paths of the outermost shared modules, in words."""
    paths = set(shared.values())
    outermost = [path for path in shared.values() if path.rpartition(".")[0] not in paths]
    return format_list(sorted(path or "everything" for path in outermost))


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
