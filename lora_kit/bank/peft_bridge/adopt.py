"""`adopt` replaces the layers of a live PeftModel in place; `to_peft` puts its own layers back."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final, TypeVar

import torch
from torch import nn

from lora_kit.bank.bank import AdapterBank
from lora_kit.bank.frozen_model import check_no_bank
from lora_kit.bank.model_layers import WrappedLayers, replace_modules
from lora_kit.bank.peft_bridge.guard import guard_peft_model, release_peft_model
from lora_kit.bank.peft_bridge.read_peft import PeftContents, PeftLayer, get_lora_tuner, read_peft_model
from lora_kit.bank.slots import LoadedAdapter
from lora_kit.bank.snapshot import check_savable
from lora_kit.errors import AdapterError, BankError, ConfigError, TargetError, format_list
from lora_kit.layers.external_params import (
    AdoptedConvolution,
    AdoptedEmbedding,
    AdoptedLayer,
    AdoptedLinear,
    AdoptedModule,
    AdoptedParameter,
)
from lora_kit.layers.introspect import kind_of
from lora_kit.layers.routing import Routing
from lora_kit.layers.slot_layer import SlotLayer
from lora_kit.targets.coverage import Coverage, survey_coverage

if TYPE_CHECKING:
    import peft

_Module = TypeVar("_Module")
_LAYER_CLASSES: Final[dict[str, type[AdoptedLayer]]] = {
    "linear": AdoptedLinear,
    "embedding": AdoptedEmbedding,
    "convolution": AdoptedConvolution,
}


def adopt(peft_model: peft.PeftModel) -> AdoptedBank:
    """Replace the layers of a PeftModel by ours, in place; training code that holds it goes on, faster.

    Every adapter gets a slot whose A and B are the very parameters that PEFT made, in the same memory, so an optimizer
    that has them continues with them. Training code calls the PeftModel as before: it trains, generates, saves and
    switches adapters. Methods that would change its layers raise an error until `bank.to_peft()`.

    Raises:
        ConfigError, BankError, TargetError: it holds something that would not mean the same here; the message names it,
            and the PeftModel is as it was.
    """
    if not isinstance(peft_model, nn.Module):
        raise ConfigError(f"a PeftModel was expected; {type(peft_model).__name__} was given")
    if "_lora_kit" in getattr(peft_model, "__dict__", {}):
        raise BankError("this PeftModel is adopted already", hint="its bank is the one that adopt returned")
    if any(parameter.is_meta for parameter in peft_model.parameters()):
        raise BankError("this PeftModel is offloaded, or on meta", hint="load it to one device first")
    contents = read_peft_model(peft_model)
    check_no_bank(contents.base)
    bank = AdoptedBank(peft_model, contents)
    try:
        for name in contents.configs:
            bank.adopt_adapter(name)
    except BaseException:
        bank.detach()
        raise
    return bank


class AdoptedBank(AdapterBank):
    """The bank of a PeftModel. Made by `adopt`.

    Attributes:
        peft_model: whose adapters these are.
    """

    def __init__(self, peft_model: peft.PeftModel, contents: PeftContents) -> None:
        super().__init__(contents.base, slots=None, max_rank=None, dtype=torch.float32, cache_bytes=2**30)
        self._frozen_model.unfreeze()  # only adapters' own parameters required grad, and still do
        self.peft_model = peft_model
        self._peft_contents = contents
        self._replacements: dict[nn.Module, AdoptedLayer] = {}
        for layer in reversed(contents.layers):  # inner wrappers first
            inner = self._replacements.get(layer.inner_module)
            self._replacements[layer.module] = _make_replacement(layer, inner, self._routing)
        self._layers.register({layer.path: self._replacements[layer.module] for layer in contents.layers})
        self._adopted_adapters: dict[str, LoadedAdapter] = {}
        inside = {layer.inner_module for layer in contents.layers}
        outermost = {theirs: ours for theirs, ours in self._replacements.items() if theirs not in inside}
        replace_modules(self.model, outermost)
        guard_peft_model(peft_model, self)

    def adopt_adapter(self, name: str) -> None:
        """Give a slot to an adapter of the PeftModel.

        Raises:
            BankError: it could not be saved.
            TargetError: its config and its layers do not agree.
        """
        adopted = LoadedAdapter(self._peft_contents.configs[name], _find_adapter_coverage(name, self._peft_contents))
        with self._loaded_adapters.admit_adapters({name: adopted}, keep=()):
            for layer in self._peft_contents.layers:
                own = layer.adapters.get(name)
                if own is not None:
                    self._replacements[layer.module].adopt(adopted.slot, own.parameters, own.scaling, own.dropout)
                    adopted.layers.append(layer.path)
            _refuse_unsavable(name, adopted, self._layers, self.model)
        self._adopted_adapters[name] = adopted
        self._refresh_trainable()
        if name == self._peft_contents.active:
            self.use(name)

    @contextlib.contextmanager
    def as_peft(self) -> Iterator[None]:
        """Put PEFT's own layers back within a block, which may not add or remove adapters."""
        wrappers = self._restore_peft_layers()
        try:
            yield
        finally:
            replace_modules(self.model, wrappers)
            guard_peft_model(self.peft_model, self)
            self._refresh_trainable()

    def copy_with_peft_layers(self, module: _Module, memo: dict[int, object]) -> _Module:
        """Return a deep copy of the PeftModel, or of its tuner, that has PEFT's own layers and nothing of this bank.

        Args:
            memo: as of `copy.deepcopy`.
        """
        with self.as_peft(), self._frozen_model.suspend():
            return copy.deepcopy(module, memo)

    def to_peft(self) -> peft.PeftModel:
        """Return the PeftModel with its own layers; its parameters are the same objects with their present values.

        The adapter in use here is the active one there; which parameters require grad stays as it is.

        Raises:
            BankError: adapters were added or removed since, or rows use different ones; the bank is as it was.
        """
        self._check_same_adapters()
        active = self.active
        if isinstance(active, tuple):
            raise BankError("rows() uses several adapters; one can be active in PEFT", hint="leave the block first")
        parameters = [p for adopted in self._adopted_adapters.values() for p in self._get_parameters(adopted)]
        flags = [(parameter, parameter.requires_grad) for parameter in parameters]
        self.detach()
        tuner = get_lora_tuner(self.peft_model)
        if active != self._peft_contents.active:
            if active is None:
                tuner.disable_adapter_layers()
            else:
                tuner.enable_adapter_layers()
                self.peft_model.set_adapter(active)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        return self.peft_model

    def detach(self) -> None:
        """Give the PeftModel its own layers back, with the adapter active that was active in it."""
        if self._frozen_model.is_attached:
            self._restore_peft_layers()
        super().detach()

    def _restore_peft_layers(self) -> Mapping[nn.Module, SlotLayer]:
        """Put PEFT's own layers back, in the training mode of ours; return the wrappers that were there instead.

        Such a wrapper may be around one of ours, for an adapter that was added to this bank.
        """
        originals = {layer: theirs for theirs, layer in self._replacements.items()}
        wrappers: dict[nn.Module, SlotLayer] = {}
        for layer in _find_wrappers(self.model):
            theirs = next((originals[inner] for inner in _iterate_nested(layer) if inner in originals), None)
            if theirs is not None:
                wrappers[theirs] = layer
        replace_modules(self.model, {layer: theirs for theirs, layer in wrappers.items()})
        for theirs, layer in self._replacements.items():
            _copy_mode(theirs, layer)
        release_peft_model(self.peft_model)
        return wrappers

    def _refresh_trainable(self) -> None:
        """Update which parameters require grad."""
        for ours in self._replacements.values():
            ours.refresh_trainable()
        for adopted in self._adopted_adapters.values():
            adopted.leaves = [leaf for leaf in self._get_parameters(adopted) if leaf.requires_grad]

    def _get_parameters(self, adopted: LoadedAdapter) -> list[nn.Parameter]:
        entries = [self._layers.entry(path, adopted.slot) for path in adopted.layers]
        tensors = [tensor for entry in entries for tensor in entry.tensors.values()]
        return [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]

    def _check_same_adapters(self) -> None:
        """Raise BankError where adapters were added or removed since the PeftModel was adopted."""
        before, now = self._adopted_adapters, self._loaded_adapters
        added = [name for name in now if before.get(name) is not now[name]]
        removed = [name for name in before if name not in now]
        if added or removed:
            change = f"{format_list(added)} was added" if added else f"{format_list(removed)} was removed"
            raise BankError(f"{change} after the PeftModel was adopted", hint="save adapters, and load them in PEFT")


def _refuse_unsavable(name: str, loaded: LoadedAdapter, layers: WrappedLayers, model: nn.Module) -> None:
    """Raise BankError for an adapter that could not be saved as it is."""
    try:
        check_savable(loaded, layers, model)
    except AdapterError as error:
        raise BankError(
            f"adapter {name!r} could not be saved: {error.message}", hint="nothing was changed; it goes on in PEFT"
        ) from None


def _make_replacement(layer: PeftLayer, inner: AdoptedLayer | None, routing: Routing) -> AdoptedLayer:
    """Return a layer of ours for one of PEFT's, around the same base or the replacement of the wrapper inside."""
    ours: AdoptedLayer
    if layer.parameter:
        ours = AdoptedParameter(inner or layer.base, layer.parameter, routing)
    else:
        ours = (AdoptedModule if layer.saved else _LAYER_CLASSES[kind_of(layer.base) or "linear"])(layer.base, routing)
    ours.training = layer.module.training
    return ours


def _find_wrappers(model: nn.Module) -> Iterator[SlotLayer]:
    """Yield the outermost wrappers of a model."""
    for parent in model.modules():
        if not isinstance(parent, SlotLayer):
            yield from (child for child in parent.children() if isinstance(child, SlotLayer))


def _iterate_nested(layer: nn.Module) -> Iterator[nn.Module]:
    """Yield a wrapper and the wrappers inside it."""
    while isinstance(layer, SlotLayer):
        yield layer
        layer = layer.base_layer


def _copy_mode(theirs: nn.Module, ours: SlotLayer) -> None:
    """Copy training or evaluation mode where it was changed; the base that they share has it already."""
    if theirs.training == ours.training:
        return
    theirs.training = ours.training
    for name, child in theirs.named_children():
        if name not in ("base_layer", "original_module"):
            child.train(ours.training)


def _find_adapter_coverage(name: str, contents: PeftContents) -> Coverage:
    """Return what an adapter covers by its config, with which it is saved.

    Raises:
        TargetError: its layers are others.
    """
    coverage = survey_coverage(contents.base, contents.configs[name])
    present = {layer.path for layer in contents.layers if name in layer.adapters}
    covered = {target.path for target in coverage.targets} | set(coverage.saved)
    reasons = dict(coverage.skipped)
    differing = [f"{path} ({reasons[path]})" if path in reasons else path for path in sorted(present ^ covered)]
    if differing:
        raise TargetError(
            f"adapter {name!r}: its config and its layers do not agree on {format_list(differing)}",
            hint="nothing was changed; it goes on in PEFT",
        )
    return coverage
