"""What a bank changes in its model besides wrapping layers.

It freezes parameters, stops bitsandbytes' packing, and guards methods that would take wrapped layers out of the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Final
from weakref import WeakSet

from torch import nn
from torch.utils.hooks import RemovableHandle

from lora_kit.bank.forward_hooks import ForwardHooks, RoutedGenerate, find_parts, remove_copied_hooks
from lora_kit.bank.reference_model import ReferenceModel
from lora_kit.bank.routes import RouteChoices
from lora_kit.errors import BankError, format_list
from lora_kit.layers.introspect import pause_packing, resume_packing
from lora_kit.layers.offloaded_weights import offload_device_of
from lora_kit.layers.routing import Routing
from lora_kit.layers.slot_layer import SlotLayer

_MODELS: Final[WeakSet[nn.Module]] = WeakSet()
"""Models that have a bank, even one that has wrapped no layer yet."""

_GETTERS: Final = {"set_input_embeddings": "get_input_embeddings", "set_output_embeddings": "get_output_embeddings"}
"""Methods of transformers' models that put a new module in place of the embedding or the head, and what returns it."""
_RESIZE: Final = "resize_token_embeddings"


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
        self._routing, self._choices = routing, choices
        self._hooks: list[RemovableHandle] = []
        self._generate: RoutedGenerate | None = None
        self._register()
        _MODELS.add(model)

    @contextlib.contextmanager
    def suspend(self) -> Iterator[None]:
        """Take out, within a block, what `copy.deepcopy` of the model would copy: the hooks and the guards."""
        self._unregister()
        try:
            yield
        finally:
            self._register()

    def _register(self) -> None:
        self._hooks = ForwardHooks(self._routing, is_part=False).register(self._model)
        part_hooks = ForwardHooks(self._routing, is_part=True)
        for part in find_parts(self._model):
            self._hooks += part_hooks.register(part)
        if callable(getattr(self._model, "generate", None)):
            self._generate = RoutedGenerate(self._model, self._choices)
        _guard_embeddings(self._model)

    def _unregister(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._generate is not None:
            self._generate.remove()
        _release_embeddings(self._model)

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
        self._unregister()
        resume_packing(self._paused_layers)
        self.unfreeze()


def _guard_embeddings(model: nn.Module) -> None:
    """Let methods that replace the embedding or the head raise an error where that would take an adapter away."""
    methods = {name: partial(_set_embeddings, model, name) for name in _GETTERS}
    for name, method in {_RESIZE: partial(_resize_embeddings, model), **methods}.items():
        if hasattr(model, name):
            model.__dict__[name] = method


def _release_embeddings(model: nn.Module) -> None:
    """Undo `_guard_embeddings`."""
    for name in (*_GETTERS, _RESIZE):
        model.__dict__.pop(name, None)


def _resize_embeddings(
    model: nn.Module,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    *args: object,
    **kwargs: object,
) -> nn.Module:
    """Call the model's own method, unless adapters cover the embedding or the head, or nothing would change."""
    embedding = _get_module(model, "get_input_embeddings")
    weight = getattr(embedding, "weight", None)
    if (
        embedding is not None
        and weight is not None
        and not pad_to_multiple_of
        and new_num_tokens in (None, len(weight))
    ):
        return embedding
    for getter in _GETTERS.values():
        _refuse_covered(model, getter, _RESIZE)
    resized: nn.Module = getattr(type(model), _RESIZE)(model, new_num_tokens, pad_to_multiple_of, *args, **kwargs)
    return resized


def _set_embeddings(model: nn.Module, name: str, new: nn.Module) -> None:
    """Call the model's own method, unless an adapter covers what it would replace."""
    if _get_module(model, _GETTERS[name]) is not new:
        _refuse_covered(model, _GETTERS[name], name)
        getattr(type(model), name)(model, new)


def _refuse_covered(model: nn.Module, getter: str, method: str) -> None:
    """Raise BankError where adapters cover the embedding, or the head, that a method would replace."""
    if isinstance(_get_module(model, getter), SlotLayer):
        raise BankError(
            f"{method} would replace what {getter} returns, which adapters cover",
            hint="call it before attach; or bank.detach(), call it, and attach again",
        )


def _get_module(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        module: nn.Module | None = getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # of models without text
        module = None
    return module


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
    # Activations without weights, which XLM's models have from one table, are nobody's.
    own = {module for module in model.modules() if _holds_tensors(module)}
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
    if any(isinstance(module, ReferenceModel) for module in model.modules()):
        raise BankError(
            "this model is the reference of one that has a bank already", hint="add adapters to the bank that made it"
        )
    if any(isinstance(module, SlotLayer) for module in model.modules()):
        raise BankError(
            "this model is a copy of one that has a bank already, and computes with the adapter that was in use then",
            hint="copy the model before attach, or after detach",
        )
    remove_copied_hooks(model)


def _holds_tensors(module: nn.Module) -> bool:
    return any(True for _ in chain(module.parameters(), module.buffers()))


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
