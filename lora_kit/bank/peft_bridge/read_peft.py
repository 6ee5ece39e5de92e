"""Read what a PeftModel holds, layer by layer; raise an error that names what the bank does not support."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from torch import nn

from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import BankError, ConfigError, format_list
from lora_kit.layers.experts import list_own_parameters
from lora_kit.layers.initialization import MAGNITUDE, A, B
from lora_kit.layers.introspect import kind_of, reason_black_box

if TYPE_CHECKING:
    import peft

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
"""The layers of PEFT that ours can replace."""
_DORA_VARIANT: Final = "DoraLinearVariant"


@dataclass(frozen=True)
class PeftLayerAdapter:
    """What one adapter has in one layer.

    Attributes:
        parameters: by the names of a slot's tensors; PEFT's own objects.
        scaling: of the low-rank update.
        dropout: of its input.
    """

    parameters: Mapping[str, nn.Parameter]
    scaling: float = 1.0
    dropout: float = 0.0


@dataclass(frozen=True)
class PeftLayer:
    """A layer of PEFT's in a model.

    Attributes:
        path: in the base model; it ends in the parameter where only that is adapted.
        module: PEFT's wrapper.
        base: the wrapped module.
        saved: whether adapters replace the base as a whole.
        adapters: what each adapter has here, by its name.
        parameter: name of the one parameter that is adapted; empty where that is the layer's weight.
    """

    path: str
    module: Any
    base: nn.Module
    saved: bool
    adapters: Mapping[str, PeftLayerAdapter]
    parameter: str = ""

    @property
    def inner_module(self) -> nn.Module:
        """The module directly inside the wrapper: the base, or the wrapper of another of its parameters."""
        inner: nn.Module = self.base if self.saved else self.module.base_layer
        return inner


@dataclass(frozen=True)
class PeftContents:
    """What a PeftModel holds.

    Attributes:
        base: the model inside, with PEFT's layers.
        configs: by name of the adapter.
        layers: PEFT's, in the model's order.
        active: the adapter in use; None while adapters are disabled.
    """

    base: nn.Module
    configs: Mapping[str, LoraConfig]
    layers: tuple[PeftLayer, ...]
    active: str | None


def read_peft_model(peft_model: object) -> PeftContents:
    """Read what a PeftModel holds, and change nothing.

    Raises:
        ConfigError: not a PeftModel, another method than LoRA, or an unsupported variant of it.
        BankError: it is in a state, or has a layer, that ours cannot replace; lists everything.
    """
    tuner = get_lora_tuner(peft_model)
    configs = {name: _read_config(name, config) for name, config in tuner.peft_config.items()}
    layers = tuple(_find_layers(tuner.model))
    problems = [problem for layer in layers for problem in _find_problems(layer, configs)]
    problems += _find_shared_parameters(layers)
    problems += _find_other_trained(tuner.model, layers)
    if not layers:
        problems.append("it has no layer of PEFT's")
    if problems:
        raise BankError(f"this PeftModel cannot be adopted: {format_list(problems, most=4)}", hint=_HINT)
    return PeftContents(tuner.model, configs, layers, _find_active_adapter(tuner, layers))


def get_lora_tuner(peft_model: object) -> peft.LoraModel:
    """Return the LoraModel inside a PeftModel.

    Raises:
        ConfigError: not a PeftModel, or one of another method.
    """
    import peft

    if not isinstance(peft_model, peft.PeftModel):
        raise ConfigError(f"a PeftModel was expected, {type(peft_model).__name__} was given", hint=_HINT)
    methods = {str(getattr(c.peft_type, "value", c.peft_type)) for c in peft_model.peft_config.values()} - {"LORA"}
    if methods:
        raise ConfigError(f"its method is {format_list(sorted(methods))}; only LORA is adopted", hint=_HINT)
    tuner = peft_model.base_model
    if type(tuner) is not peft.LoraModel:
        raise ConfigError(f"its tuner is {type(tuner).__name__}, not LoraModel", hint=_HINT)
    return tuner


def _read_config(name: str, peft_config: peft.PeftConfig) -> LoraConfig:
    try:
        config = LoraConfig.of(peft_config)
    except ConfigError as error:
        raise ConfigError(f"adapter {name!r}: {error.message}", hint=_HINT) from None
    if config.starts_from_weight:
        # PEFT subtracted the initialization from the base, which is another one now.
        raise ConfigError(f"adapter {name!r}: init_lora_weights={config.init_lora_weights} is not adopted", hint=_HINT)
    if config.trainable_token_indices is not None:
        raise ConfigError(f"adapter {name!r}: trainable_token_indices is not adopted", hint=_HINT)
    return config


def _find_layers(base: nn.Module) -> Iterator[PeftLayer]:
    """Yield PEFT's layers with the paths of what they wrap."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for path, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            copies = getattr(module, "modules_to_save", {})
            adapters = {name: PeftLayerAdapter(dict(copy.named_parameters())) for name, copy in copies.items()}
            yield PeftLayer(path, module, module.original_module, True, adapters)
        elif isinstance(module, BaseTunerLayer):
            name = _parameter_of(module)
            # Each of several parameters of one module has a wrapper around the wrapper of the one before.
            path = f"{_NESTED_SUFFIX.sub('', path)}.{name}" if name else path
            yield PeftLayer(path, module, module.get_base_layer(), False, dict(_read_lora_weights(module)), name)


def _read_lora_weights(module: Any) -> Iterator[tuple[str, PeftLayerAdapter]]:
    """Yield what each adapter has in a layer with LoRA weights of any kind."""
    for side_a, side_b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        for name, a in getattr(module, side_a, {}).items():
            b = getattr(module, side_b)[name]
            # A and B are modules in a linear layer, and parameters in an embedding.
            tensors = {A: getattr(a, "weight", a), B: getattr(b, "weight", b)}
            if name in getattr(module, MAGNITUDE, {}):
                tensors[MAGNITUDE] = module.lora_magnitude_vector[name].weight
            dropout = float(getattr(module.lora_dropout[name], "p", 0.0))
            yield name, PeftLayerAdapter(tensors, float(module.scaling[name]), dropout)


def _find_problems(layer: PeftLayer, configs: Mapping[str, LoraConfig]) -> Iterator[str]:
    """Yield why a layer of ours cannot replace this one."""
    from peft.utils.other import ModulesToSaveWrapper

    module, kind = layer.module, _name_of(layer.module)
    if layer.saved and type(module) is not ModulesToSaveWrapper:
        yield f"{layer.path} is a {type(module).__name__}"
        return
    if not layer.saved and kind not in _SUPPORTED_LAYERS:
        yield f"{layer.path} is a {kind.removeprefix('peft.tuners.')}"
        return
    if layer.saved and next(layer.base.buffers(), None) is not None:
        yield f"{layer.path} is in modules_to_save and has buffers"
    if layer.parameter:
        yield from _find_order_problems(layer)
    elif not layer.saved and (kind_of(layer.base) is None or module.base_layer is not layer.base):
        yield f"{layer.path} wraps a {type(module.base_layer).__name__}"
    if not layer.saved and module.merged:
        yield f"{layer.path} is merged with {format_list(module.merged_adapters)}"
    reason = reason_black_box(module)
    if reason is not None:
        yield f"{layer.path} {reason}"
    for name, own in layer.adapters.items():
        yield from (f"{layer.path}: {problem}" for problem in _find_adapter_problems(name, own, layer, configs[name]))


def _name_of(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def _parameter_of(module: Any) -> str:
    """Return the name of the parameter that a wrapper is for; empty for a wrapper of a layer."""
    return str(module.parameter_name) if _name_of(module) == _PARAMETER_WRAPPER else ""


def _find_order_problems(layer: PeftLayer) -> Iterator[str]:
    """Yield why wrappers of one module's parameters are not in the order by which an adapter's file numbers them."""
    inside: Any = layer.inner_module
    if inside is layer.base:
        return
    if _name_of(inside) != _PARAMETER_WRAPPER:
        yield f"{layer.path} wraps a {type(inside).__name__}"
        return
    order = [name for name, _ in list_own_parameters(layer.base)]
    if order.index(inside.parameter_name) >= order.index(layer.parameter):
        yield f"{layer.path} is wrapped around {inside.parameter_name}, which comes after it in the module"


def _find_adapter_problems(name: str, own: PeftLayerAdapter, layer: PeftLayer, config: LoraConfig) -> Iterator[str]:
    module: Any = layer.module
    special = [(key, type(t).__name__) for key, t in own.parameters.items() if type(t) is not nn.Parameter]
    for key, tensor_type in special[:1]:
        yield f"{key} of {name!r} is a {tensor_type}, not a plain parameter"
    if layer.saved:
        return
    variant = type(module.lora_variant[name]).__name__ if name in module.lora_variant else ""
    if variant not in ("", _DORA_VARIANT):
        yield f"{name!r} is a {variant} there"
    if module.lora_bias.get(name):
        yield f"lora_bias of {name!r}"
    if own.scaling != config.scaling_of(layer.path):
        yield f"the scaling of {name!r} was set to {own.scaling:g}; its config says {config.scaling_of(layer.path):g}"
    if own.dropout != config.lora_dropout:
        yield f"the dropout of {name!r} was set to {own.dropout:g}; its config says {config.lora_dropout:g}"


def _find_shared_parameters(layers: tuple[PeftLayer, ...]) -> Iterator[str]:
    """Yield the layers that share a parameter with another: a slot each would train it twice."""
    seen: dict[int, str] = {}
    for layer in layers:
        for adapter in layer.adapters.values():
            for tensor in adapter.parameters.values():
                if id(tensor) in seen:
                    yield f"{layer.path} shares a parameter with {seen[id(tensor)]}"
                seen[id(tensor)] = layer.path


def _find_other_trained(base: nn.Module, layers: tuple[PeftLayer, ...]) -> list[str]:
    """Return why a parameter that no adapter owns is trained, if there is one: a bank keeps its base frozen."""
    own = {id(t) for layer in layers for adapter in layer.adapters.values() for t in adapter.parameters.values()}
    names = [name for name, p in base.named_parameters() if p.requires_grad and id(p) not in own]
    return [f"{names[0]} is trained and belongs to no adapter"] if names else []


def _find_active_adapter(tuner: peft.LoraModel, layers: tuple[PeftLayer, ...]) -> str | None:
    """Return the one adapter in use; None without one, or while adapters are disabled.

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
