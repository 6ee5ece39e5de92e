"""How an adopted PeftModel behaves: which methods PEFT runs, which the bank runs, which raise an error."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final, Protocol

from lora_kit.errors import BankError

if TYPE_CHECKING:
    import peft

    from lora_kit.bank.peft_bridge.adopt import AdoptedBank

_PEFT_BASE: Final = "__base__"
"""PEFT's name for the base among the adapters of a batch's rows."""
_CLASS_PREFIX: Final = "Adopted"


class _Guarded(Protocol):
    """A PeftModel, or its tuner, with guarded methods."""

    _lora_kit: AdoptedBank
    peft_config: Mapping[str, object]

    def set_adapter(self, adapter_name: str, *, inference_mode: bool) -> None: ...

    def load_adapter(self, model_id: object, adapter_name: str, *args: object, **kwargs: object) -> object: ...


def _delegate_to_peft(name: str) -> Callable[..., object]:
    """Return a method that PEFT runs itself, with its own layers in the model."""

    def method(self: _Guarded, *args: object, **kwargs: object) -> object:
        with self._lora_kit.as_peft():
            return getattr(self, name)(*args, **kwargs)

    method.__name__ = name
    return method


def _refuse_method(name: str) -> Callable[..., object]:
    def method(self: _Guarded, *args: object, **kwargs: object) -> object:
        raise BankError(f"{name} was called, and the layers of this PeftModel are adopted", hint="bank.to_peft() first")

    method.__name__ = name
    return method


@contextlib.contextmanager
def _disable_adapter(self: _Guarded) -> Iterator[None]:
    with self._lora_kit.using(None):
        yield


def _set_adapter(self: _Guarded, adapter_name: str, inference_mode: bool = False) -> None:
    if not isinstance(adapter_name, str):
        raise BankError(f"one adapter is active at a time; {adapter_name!r} was given", hint="bank.to_peft() first")
    bank = self._lora_kit
    with bank.as_peft():
        self.set_adapter(adapter_name, inference_mode=inference_mode)
    bank.use(adapter_name)


def _load_adapter(self: _Guarded, model_id: object, adapter_name: str, *args: object, **kwargs: object) -> object:
    """Load values into an adapter that exists, as a Trainer loads its best checkpoint."""
    if adapter_name not in self.peft_config:
        raise BankError(f"load_adapter was called for {adapter_name!r}, a new one", hint="bank.load(name, folder)")
    with self._lora_kit.as_peft():
        return self.load_adapter(model_id, adapter_name, *args, **kwargs)


@contextlib.contextmanager
def _route_rows(
    self: _Guarded, *args: object, adapter_names: list[str] | None = None, **kwargs: object
) -> Iterator[None]:
    """Route rows by `adapter_names`, one per row of the batch."""
    if adapter_names is None:
        yield
        return
    with self._lora_kit.rows([None if name == _PEFT_BASE else name for name in adapter_names]):
        yield


def _deep_copy(self: _Guarded, memo: dict[int, object]) -> object:
    """Return a PeftModel of its own, with PEFT's layers and the values of the parameters."""
    return self._lora_kit.copy_with_peft_layers(self, memo)


def _reduce(self: _Guarded, protocol: object) -> tuple[object, ...]:
    """Pickle a copy with PEFT's layers: a bank is not pickled."""
    return _return_copy, (copy.deepcopy(self),)


def _return_copy(model: object) -> object:
    """Return what was pickled."""
    return model


_COPIES: Final[Mapping[str, Callable[..., object]]] = {"__deepcopy__": _deep_copy, "__reduce_ex__": _reduce}
_MODEL_METHODS: Final[Mapping[str, Callable[..., object]]] = {
    "state_dict": _delegate_to_peft("state_dict"),
    "load_state_dict": _delegate_to_peft("load_state_dict"),
    "save_pretrained": _delegate_to_peft("save_pretrained"),
    "get_layer_status": _delegate_to_peft("get_layer_status"),
    "get_model_status": _delegate_to_peft("get_model_status"),
    "load_adapter": _load_adapter,
    "set_adapter": _set_adapter,
    "disable_adapter": _disable_adapter,
    **{name: _refuse_method(name) for name in ("add_adapter", "delete_adapter", "set_requires_grad")},
    **_COPIES,
}
"""Methods of a PeftModel that reach into its layers."""
_TUNER_METHODS: Final[Mapping[str, Callable[..., object]]] = {
    "state_dict": _delegate_to_peft("state_dict"),
    "load_state_dict": _delegate_to_peft("load_state_dict"),
    "_enable_peft_forward_hooks": _route_rows,
    **_COPIES,
    **{
        name: _refuse_method(name)
        for name in (
            "add_weighted_adapter",
            "delete_adapter",
            "disable_adapter_layers",
            "enable_adapter_layers",
            "inject_adapter",
            "merge_adapter",
            "merge_and_unload",
            "set_adapter",
            "set_requires_grad",
            "subtract_mutated_init",
            "unload",
            "unmerge_adapter",
        )
    },
}
"""Methods of the LoraModel inside."""
GUARDED_METHODS: Final = (_MODEL_METHODS, _TUNER_METHODS)


def guard_peft_model(peft_model: peft.PeftModel, bank: AdoptedBank) -> None:
    """Replace the guarded methods of a PeftModel and its tuner by those here, in a class of its own."""
    for module, methods in zip((peft_model, peft_model.base_model), GUARDED_METHODS, strict=True):
        base = type(module)
        module.__class__ = type(_CLASS_PREFIX + base.__name__, (base,), {**methods, "__module__": base.__module__})
        module.__dict__["_lora_kit"] = bank


def release_peft_model(peft_model: peft.PeftModel) -> None:
    """Undo `guard_peft_model`."""
    for module in (peft_model, peft_model.base_model):
        del module.__dict__["_lora_kit"]
        module.__class__ = type(module).__mro__[1]
