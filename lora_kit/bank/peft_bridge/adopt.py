"""`adopt`: the layers of a live PeftModel replaced in place; `to_peft`: its own layers back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import nn

from lora_kit.bank.bank import AdapterBank
from lora_kit.bank.model_layers import WrappedLayers, replace_modules
from lora_kit.bank.peft_bridge.guard import guard_peft_model, release_peft_model
from lora_kit.bank.peft_bridge.read_peft import PeftContents, PeftLayer, read_peft_model
from lora_kit.bank.residents import LoadedAdapter
from lora_kit.bank.snapshot import check_savable
from lora_kit.errors import AdapterError, BankError, TargetError, format_list
from lora_kit.layers.external_params import (
    AdoptedConvolution,
    AdoptedEmbedding,
    AdoptedLinear,
    AdoptedModule,
    AdoptedParameter,
    AdoptingLayer,
)
from lora_kit.layers.introspect import kind_of
from lora_kit.layers.routing import Routing
from lora_kit.layers.slot_layer import SlotLayer
from lora_kit.targets.coverage import Coverage, survey_coverage

_LAYER_CLASSES: Final[dict[str, type[AdoptingLayer]]] = {
    "linear": AdoptedLinear,
    "embedding": AdoptedEmbedding,
    "convolution": AdoptedConvolution,
}


def adopt(peft_model: Any) -> AdoptedBank:
    """Replace the layers of a PeftModel by ours, in place; training code that holds it goes on, faster.

    Every adapter becomes a slot whose A and B are the very parameters they were, in the memory they were in, so an
    optimizer that has them goes on with them. The PeftModel stays what the training code calls: it trains, generates,
    saves and switches adapters; what would change its layers is refused until `bank.to_peft()`.

    Raises:
        ConfigError, BankError, TargetError: something in it would not mean the same here; it is named, and the
            PeftModel is as it was.
    """
    if "_lora_kit" in getattr(peft_model, "__dict__", {}):
        raise BankError("this PeftModel is adopted already", hint="its bank is the one that adopt returned")
    reading = read_peft_model(peft_model)
    if any(isinstance(module, SlotLayer) for module in reading.base.modules()):
        raise BankError("there is a bank inside this PeftModel already", hint="detach it first")
    bank = AdoptedBank(peft_model, reading)
    try:
        for name in reading.configs:
            bank.take_in(name)
    except BaseException:
        bank.detach()
        raise
    return bank


class AdoptedBank(AdapterBank):
    """The bank of a PeftModel. Made by `adopt`.

    Attributes:
        peft_model: whose layers these are.
    """

    def __init__(self, peft_model: Any, reading: PeftContents) -> None:
        super().__init__(reading.base, slots=None, max_rank=None, dtype=torch.float32, cache_bytes=2**30)
        for parameter in self._frozen:  # all of them are adapters' own, and go on as they are
            parameter.requires_grad_(True)
        self._frozen.clear()
        self.peft_model = peft_model
        self._peft_contents = reading
        self._stand_ins: dict[nn.Module, AdoptingLayer] = {}
        for layer in reversed(reading.layers):  # what is inside another one first
            self._stand_ins[layer.module] = _make_stand_in(
                layer, self._stand_ins.get(layer.inner_module), self._routing
            )
        self._layers.take_over({layer.path: self._stand_ins[layer.module] for layer in reading.layers})
        self._adopted_adapters: dict[str, LoadedAdapter] = {}
        inside = {layer.inner_module for layer in reading.layers}
        replace_modules(self.model, {theirs: ours for theirs, ours in self._stand_ins.items() if theirs not in inside})
        guard_peft_model(peft_model, self)

    def take_in(self, name: str) -> None:
        """Give a slot to an adapter of the PeftModel.

        Raises:
            BankError: it could not be saved.
            TargetError: its config and its layers do not agree.
        """
        resident = LoadedAdapter(self._peft_contents.configs[name], _find_adapter_coverage(name, self._peft_contents))
        with self._loaded_adapters.admit_adapters({name: resident}, keep=()):
            for layer in self._peft_contents.layers:
                held = layer.adapters.get(name)
                if held is not None:
                    self._stand_ins[layer.module].adopt(resident.slot, held.parameters, held.scaling, held.dropout)
                    resident.layers.append(layer.path)
            _refuse_unsavable(name, resident, self._layers, self.model)
        self._adopted_adapters[name] = resident
        self._refresh_trainable()
        if name == self._peft_contents.active:
            self.use(name)

    @contextlib.contextmanager
    def as_peft(self) -> Iterator[None]:
        """The PeftModel as PEFT made it for the length of a block, which may not add or remove adapters."""
        stood = self._restore_peft_layers()
        try:
            yield
        finally:
            replace_modules(self.model, stood)
            guard_peft_model(self.peft_model, self)
            self._refresh_trainable()

    def to_peft(self) -> Any:
        """The PeftModel with its own layers, its parameters the same objects with what they have become.

        The adapter in use here is the active one there; which parameters require grad stays as it is.

        Raises:
            BankError: adapters came or went meanwhile, or rows use different ones; the bank is as it was.
        """
        self._check_same_adapters()
        active = self.active
        if isinstance(active, tuple):
            raise BankError("inside rows() there is no one adapter to be active in PEFT", hint="leave the block first")
        flags = [
            (p, p.requires_grad) for resident in self._adopted_adapters.values() for p in self._parameters_of(resident)
        ]
        self.detach()
        if active != self._peft_contents.active:
            if active is None:
                self.peft_model.base_model.disable_adapter_layers()
            else:
                self.peft_model.base_model.enable_adapter_layers()
                self.peft_model.set_adapter(active)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        return self.peft_model

    def detach(self) -> None:
        """Give the PeftModel its own layers back; the adapter that was active in it is so again."""
        if "_lora_kit_bank" in self.model.__dict__:
            self._restore_peft_layers()
        super().detach()

    def _restore_peft_layers(self) -> Mapping[nn.Module, SlotLayer]:
        """PEFT's own layers in their places, in the mode that ours were put into meanwhile; returns what stood there.

        That may be a wrapper around one of ours, which an adapter brought that came here.
        """
        ours = {layer: theirs for theirs, layer in self._stand_ins.items()}
        stood = {}
        for layer in _find_wrappers(self.model):
            found = next((ours[each] for each in _iterate_nested(layer) if each in ours), None)
            if found is not None:
                stood[found] = layer
        replace_modules(self.model, {layer: theirs for theirs, layer in stood.items()})
        for theirs, layer in self._stand_ins.items():
            _copy_mode(theirs, layer)
        release_peft_model(self.peft_model)
        return stood

    def _refresh_trainable(self) -> None:
        """See which parameters require grad by now."""
        for ours in self._stand_ins.values():
            ours.refresh_trainable()
        for resident in self._adopted_adapters.values():
            resident.leaves = [leaf for leaf in self._parameters_of(resident) if leaf.requires_grad]

    def _parameters_of(self, resident: LoadedAdapter) -> list[nn.Parameter]:
        held = [tensor for path in resident.layers for tensor in self._entry(resident, path).values()]
        return [tensor for tensor in held if isinstance(tensor, nn.Parameter)]

    def _check_same_adapters(self) -> None:
        came = [
            name
            for name in self._loaded_adapters
            if self._adopted_adapters.get(name) is not self._loaded_adapters[name]
        ]
        gone = [name for name in self._adopted_adapters if name not in self._loaded_adapters]
        if came or gone:
            what = f"{format_list(came)} came" if came else f"{format_list(gone)} went"
            raise BankError(f"{what} after the PeftModel was adopted", hint="save adapters, and load them in PEFT")


def _refuse_unsavable(name: str, resident: LoadedAdapter, layers: WrappedLayers, model: nn.Module) -> None:
    try:
        check_savable(resident, layers, model)
    except AdapterError as error:
        raise BankError(
            f"adapter {name!r} could not be saved: {error.message}", hint="nothing was changed; it goes on in PEFT"
        ) from None


def _make_stand_in(layer: PeftLayer, inside: AdoptingLayer | None, routing: Routing) -> AdoptingLayer:
    """A layer of ours around the base of one of PEFT's, or around the one that stands in for what is inside it."""
    ours: AdoptingLayer
    if layer.parameter:
        ours = AdoptedParameter(inside or layer.base, layer.parameter, routing)
    else:
        ours = (AdoptedModule if layer.saved else _LAYER_CLASSES[kind_of(layer.base) or "linear"])(layer.base, routing)
    ours.training = layer.module.training
    return ours


def _find_wrappers(model: nn.Module) -> Iterator[SlotLayer]:
    """Wrappers that stand in a model, without those inside others."""
    for parent in model.modules():
        if not isinstance(parent, SlotLayer):
            yield from (child for child in parent.children() if isinstance(child, SlotLayer))


def _iterate_nested(layer: nn.Module) -> Iterator[nn.Module]:
    """A wrapper and the wrappers inside it."""
    while isinstance(layer, SlotLayer):
        yield layer
        layer = layer.base_layer


def _copy_mode(theirs: nn.Module, ours: SlotLayer) -> None:
    """Training or evaluation mode, where it was changed meanwhile; the base they share has it already."""
    if theirs.training == ours.training:
        return
    theirs.training = ours.training
    for name, child in theirs.named_children():
        if name not in ("base_layer", "original_module"):
            child.train(ours.training)


def _find_adapter_coverage(name: str, reading: PeftContents) -> Coverage:
    """What an adapter covers, which its config and its layers must agree on: it is saved with that config.

    Raises:
        TargetError: they do not.
    """
    coverage = survey_coverage(reading.base, reading.configs[name])
    here = {layer.path for layer in reading.layers if name in layer.adapters}
    said = {target.path for target in coverage.targets} | set(coverage.saved)
    odd = sorted(here ^ said)
    if odd:
        reasons = dict(coverage.skipped)
        odd = [f"{path} ({reasons[path]})" if path in reasons else path for path in odd]
        raise TargetError(
            f"adapter {name!r}: its config and its layers do not agree on {format_list(odd)}",
            hint="nothing was changed; it goes on in PEFT",
        )
    return coverage
