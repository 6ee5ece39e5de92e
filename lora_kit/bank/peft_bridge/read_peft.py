"""What a PeftModel holds, layer by layer; whatever would not mean the same here is refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import BankError, ConfigError, format_list
from lora_kit.layers.experts import list_own_parameters
from lora_kit.layers.initialization import MAGNITUDE, A, B
from lora_kit.layers.introspect import kind_of

_HINT: Final = "what cannot be adopted goes on in PEFT; nothing was changed"
_PARAMETER_WRAPPER: Final = "peft.tuners.lora.layer.ParamWrapper"
_NESTED_SUFFIX: Final = re.compile(r"(\.base_layer)+$")
_SUPPORTED_LAYERS: Final = frozenset(
    {
        "peft.tuners.lora.layer.Linear",
        "peft.tuners.lora.layer.Embedding",
        "peft.tuners.lora.layer.Conv1d",
        "peft.tuners.lora.layer.Conv2d",
        _PARAMETER_WRAPPER,
        "peft.tuners.lora.bnb.Linear4bit",
        "peft.tuners.lora.bnb.Linear8bitLt",
    }
)
"""The layers of PEFT that ours stand in for."""
_DORA_VARIANT: Final = "DoraLinearVariant"


@dataclass(frozen=True)
class PeftLayerAdapter:
    """What one adapter has in one layer.

    Attributes:
        parameters: by the names of a slot's tensors; PEFT's own objects.
        scaling, dropout: of a pair.
    """

    parameters: Mapping[str, nn.Parameter]
    scaling: float = 1.0
    dropout: float = 0.0


@dataclass(frozen=True)
class PeftLayer:
    """A layer of PEFT's in a model.

    Attributes:
        path: in the base model; of a parameter where that is what is adapted.
        module: PEFT's wrapper. base: what it wraps.
        saved: whether adapters replace the base as a whole.
        parameter: the name of the base's one parameter that is adapted; empty where it is the layer's weight.
        adapters: what each adapter has here, by its name.
    """

    path: str
    module: Any
    base: nn.Module
    saved: bool
    adapters: Mapping[str, PeftLayerAdapter]
    parameter: str = ""

    @property
    def inner_module(self) -> nn.Module:
        """What the wrapper is directly around: the base, or the wrapper of another parameter of it."""
        found: nn.Module = self.base if self.saved else self.module.base_layer
        return found


@dataclass(frozen=True)
class PeftContents:
    """What a PeftModel holds.

    Attributes:
        base: the model inside, whose layers are PEFT's.
        configs: by name of the adapter.
        active: the adapter in use; None while adapters are disabled.
    """

    base: nn.Module
    configs: Mapping[str, LoraConfig]
    layers: tuple[PeftLayer, ...]
    active: str | None


def read_peft_model(peft_model: Any) -> PeftContents:
    """What a PeftModel holds; nothing is changed.

    Raises:
        ConfigError: not a PeftModel, another method than LoRA, or a variant of it that is not ours.
        BankError: a state or a layer that ours cannot stand in for.
    """
    tuner = _get_lora_tuner(peft_model)
    configs = {name: _read_config(name, config) for name, config in peft_model.peft_config.items()}
    layers = tuple(_find_layers(tuner.model))
    told = [problem for layer in layers for problem in _find_problems(layer, configs)]
    told += _find_shared_parameters(layers)
    told += _find_other_trained(tuner.model, layers)
    if not layers:
        told.append("no module of it carries anything of PEFT's")
    if told:
        raise BankError(f"this PeftModel cannot be adopted: {format_list(told, most=4)}", hint=_HINT)
    return PeftContents(tuner.model, configs, layers, _find_active_adapter(tuner, layers))


def _get_lora_tuner(peft_model: Any) -> Any:
    import peft

    if not isinstance(peft_model, peft.PeftModel):
        raise ConfigError(f"a PeftModel was expected, {type(peft_model).__name__} was given", hint=_HINT)
    others = {str(getattr(c.peft_type, "value", c.peft_type)) for c in peft_model.peft_config.values()} - {"LORA"}
    if others:
        raise ConfigError(f"its method is {format_list(sorted(others))}; only LORA is adopted", hint=_HINT)
    if type(peft_model.base_model) is not peft.LoraModel:
        raise ConfigError(f"its tuner is {type(peft_model.base_model).__name__}, not LoraModel", hint=_HINT)
    return peft_model.base_model


def _read_config(name: str, config: Any) -> LoraConfig:
    try:
        own = LoraConfig.of(config)
    except ConfigError as error:
        raise ConfigError(f"adapter {name!r}: {error.message}", hint=_HINT) from None
    if own.starts_from_weight:
        # PEFT has taken the start out of the base, which is another one now.
        raise ConfigError(f"adapter {name!r}: init_lora_weights={own.init_lora_weights} is not adopted", hint=_HINT)
    if own.trainable_token_indices is not None:
        raise ConfigError(f"adapter {name!r}: trainable_token_indices is not adopted", hint=_HINT)
    return own


def _find_layers(base: nn.Module) -> Iterator[PeftLayer]:
    """Layers of PEFT's by path of what they wrap."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for path, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            copies = getattr(module, "modules_to_save", {})
            held = {name: PeftLayerAdapter(dict(copy.named_parameters())) for name, copy in copies.items()}
            yield PeftLayer(path, module, module.original_module, True, held)
        elif isinstance(module, BaseTunerLayer):
            name = _parameter_of(module)
            # Of several parameters of one module, each has a wrapper around that of the one before.
            path = f"{_NESTED_SUFFIX.sub('', path)}.{name}" if name else path
            yield PeftLayer(path, module, module.get_base_layer(), False, dict(_read_lora_weights(module)), name)


def _read_lora_weights(module: Any) -> Iterator[tuple[str, PeftLayerAdapter]]:
    """What each adapter has in a layer with pairs, of whatever kind."""
    for side_a, side_b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        for name, a in getattr(module, side_a, {}).items():
            b = getattr(module, side_b)[name]
            # A linear pair is made of two modules, an embedding's of two parameters.
            tensors = {A: getattr(a, "weight", a), B: getattr(b, "weight", b)}
            if name in getattr(module, MAGNITUDE, {}):
                tensors[MAGNITUDE] = module.lora_magnitude_vector[name].weight
            yield (
                name,
                PeftLayerAdapter(
                    tensors, float(module.scaling[name]), float(getattr(module.lora_dropout[name], "p", 0.0))
                ),
            )


def _find_problems(layer: PeftLayer, configs: Mapping[str, LoraConfig]) -> Iterator[str]:
    """Why a layer of ours could not stand in for this one, in words."""
    from peft.utils.other import ModulesToSaveWrapper

    module, kind = layer.module, _name_of(layer.module)
    if layer.saved and type(module) is not ModulesToSaveWrapper:
        yield f"{layer.path} is a {type(module).__name__}"
        return
    if not layer.saved and kind not in _SUPPORTED_LAYERS:
        yield f"{layer.path} is a {kind.removeprefix('peft.tuners.')}"
        return
    if layer.saved and next(layer.base.buffers(), None) is not None:
        yield f"{layer.path} is saved whole and has buffers"
    if layer.parameter:
        yield from _find_order_problems(layer)
    elif not layer.saved and (kind_of(layer.base) is None or module.base_layer is not layer.base):
        yield f"{layer.path} wraps a {type(module.base_layer).__name__}"
    if not layer.saved and module.merged:
        yield f"{layer.path} is merged with {format_list(module.merged_adapters)}"
    if _is_hooked(module):
        yield f"{layer.path} has hooks, or a forward of its own"
    for name, held in layer.adapters.items():
        yield from (f"{layer.path}: {problem}" for problem in _find_adapter_problems(name, held, layer, configs[name]))


def _name_of(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def _parameter_of(module: Any) -> str:
    """The parameter that a wrapper is for; empty for a wrapper of a layer."""
    return module.parameter_name if _name_of(module) == _PARAMETER_WRAPPER else ""


def _find_order_problems(layer: PeftLayer) -> Iterator[str]:
    """Wrappers of one module's parameters stand in their order, by which an adapter's file tells them apart."""
    inside: Any = layer.inner_module
    if inside is layer.base:
        return
    if _name_of(inside) != _PARAMETER_WRAPPER:
        yield f"{layer.path} wraps a {type(inside).__name__}"
        return
    order = [name for name, _ in list_own_parameters(layer.base)]
    if order.index(inside.parameter_name) >= order.index(layer.parameter):
        yield f"{layer.path} is wrapped around {inside.parameter_name}, which comes later"


def _is_hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


def _find_adapter_problems(name: str, held: PeftLayerAdapter, layer: PeftLayer, config: LoraConfig) -> Iterator[str]:
    module: Any = layer.module
    odd = [key for key, tensor in held.parameters.items() if type(tensor) is not nn.Parameter]
    if odd:
        yield f"{odd[0]} of {name!r} is a {type(held.parameters[odd[0]]).__name__}, not a plain parameter"
    if layer.saved:
        return
    variant = type(module.lora_variant[name]).__name__ if name in module.lora_variant else ""
    if variant not in ("", _DORA_VARIANT):
        yield f"{name!r} is a {variant} there"
    if module.lora_bias.get(name):
        yield f"lora_bias of {name!r}"
    if held.scaling != config.scaling_of(layer.path):
        yield f"the scaling of {name!r} was set to {held.scaling:g}; its config says {config.scaling_of(layer.path):g}"
    if held.dropout != config.lora_dropout:
        yield f"the dropout of {name!r} was set to {held.dropout:g}; its config says {config.lora_dropout:g}"


def _find_shared_parameters(layers: tuple[PeftLayer, ...]) -> Iterator[str]:
    """Parameters that two layers share, which are not two parameters."""
    seen: dict[int, str] = {}
    for layer in layers:
        for held in layer.adapters.values():
            for tensor in held.parameters.values():
                if id(tensor) in seen:
                    yield f"{layer.path} shares a parameter with {seen[id(tensor)]}"
                seen[id(tensor)] = layer.path


def _find_other_trained(base: nn.Module, layers: tuple[PeftLayer, ...]) -> list[str]:
    """Parameters that are trained and belong to no adapter; a bank keeps its base frozen."""
    own = {id(t) for layer in layers for held in layer.adapters.values() for t in held.parameters.values()}
    names = [name for name, p in base.named_parameters() if p.requires_grad and id(p) not in own]
    return [f"{names[0]} is trained without being an adapter's"] if names else []


def _find_active_adapter(tuner: Any, layers: tuple[PeftLayer, ...]) -> str | None:
    """The one adapter in use.

    Raises:
        BankError: several are, or layers disagree.
    """
    disabled = {layer.module.disable_adapters for layer in layers}
    active = {tuple(layer.module.active_adapters) for layer in layers if layer.adapters}
    if len(disabled) > 1:
        raise BankError("adapters are disabled in some of its layers only", hint=_HINT)
    if True in disabled:
        return None
    names = list(tuner.active_adapters)
    if len(names) > 1:
        raise BankError(f"{len(names)} adapters are active at once: {format_list(names)}", hint=_HINT)
    if not names:
        return None
    if any(set(each) - set(names) for each in active):
        raise BankError("its layers do not agree on which adapter is active", hint=_HINT)
    return str(names[0])
