"""Adapters under the module names of an older transformers, read under those of the model.

transformers renames modules between its versions, and fuses the experts of a layer, which were linear layers of their
own, into one parameter. The mapping with which it reads old checkpoints says how, and PEFT applies it to adapters too.
Of several fused layers `W = [W_1; ...; W_n]` the update is exact: `A = [A_1; ...; A_n]` and `B` has the `B_i` as the
blocks of its diagonal, so that the rank is n times what it was.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.peft_keys import PREFIX, LoraWeights, lora_weight_keys
from lora_kit.config.renamed_paths import rename_config_paths
from lora_kit.errors import AdapterError, format_list
from lora_kit.layers.experts import list_own_parameters
from lora_kit.layers.introspect import kind_of
from lora_kit.layers.parameter import is_transposed
from lora_kit.targets.coverage import survey_coverage
from lora_kit.targets.match import Modules, named_layers
from lora_kit.targets.rename_command import list_module_paths

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter, WeightTransform

logger = logging.getLogger(__name__)


def convert_to_model_names(name: str, adapter: Adapter, model: nn.Module, modules: Modules | None = None) -> Adapter:
    """Return an adapter under the names of a model's modules: itself, unless transformers' mapping has others for it.

    Args:
        name: of the adapter, for the log.
        modules: those of the model, where the caller has listed them.

    Returns:
        An adapter with the same updates on modules that the model has; `adapter` itself if there is no place for one.

    Raises:
        AdapterError: LoRA weights of experts whose number or size is not the model's, or that cannot be those of one
            parameter.
    """
    places = dict(named_layers(model) if modules is None else modules)
    missing = [path for path in list_module_paths(adapter) if path not in places]
    transforms = _find_transforms(model) if missing else []
    if not transforms:
        return adapter
    parameters = _list_parameters(places)
    names = _find_model_names(missing, transforms, parameters, places)
    if names is None:
        return adapter
    if names.parts:
        _refuse_fusing(name, adapter, names)
    logger.warning(
        "%s: %d of its modules have the names of an older transformers; they are read as this model's: %s -> %s",
        name,
        len(missing),
        missing[0],
        names.place_of(missing[0]),
    )
    return _fuse(adapter, model, names, parameters) if names.parts else _rename(adapter, model, names.renamed)


def _refuse_fusing(name: str, adapter: Adapter, names: _ModelNames) -> None:
    """Raise AdapterError where an adapter has more than A and B for layers that are parts of a parameter here."""
    layer, part = next(iter(names.parts.items()))
    fused = f"{layer} is a part of {part.parameter} in this model"
    if adapter.config.use_dora:
        raise AdapterError(
            f"{name}: use_dora rescales the rows of each layer, but {fused}, whose update is A and B alone",
            hint="merge it with a transformers of its own age, and load the result; or train without use_dora",
        )
    if adapter.config.target_parameters:
        raise AdapterError(
            f"{name}: target_parameters {format_list(adapter.config.target_parameters)} beside layers that it does not "
            f"have: {fused}",
            hint="train the layers and the parameters as two adapters",
        )


# Which place each module has in the model


@dataclass(frozen=True)
class _FusedPart:
    """A layer of an older transformers that is some rows of a matrix of a parameter, or all of them (a router's).

    Attributes:
        parameter: path of the parameter, (experts, out, in) or (out, in).
        expert: which of the matrices.
        part: which of the equal parts of its rows.
        parts: how many there are.
    """

    parameter: str
    expert: int = 0
    part: int = 0
    parts: int = 1


@dataclass
class _ModelNames:
    """Where the modules of an adapter are in the model.

    Attributes:
        renamed: paths of the model's modules, by the adapter's.
        parts: parts of parameters, by the adapter's path.
    """

    renamed: dict[str, str] = field(default_factory=dict)
    parts: dict[str, _FusedPart] = field(default_factory=dict)

    def place_of(self, path: str) -> str:
        """Return the module or the parameter of the model that a module of the adapter is."""
        part = self.parts.get(path)
        return self.renamed[path] if part is None else part.parameter


def _find_transforms(model: nn.Module) -> Sequence[WeightTransform]:
    """Return the renamings and conversions with which transformers reads old checkpoints of a model."""
    if "transformers" not in sys.modules:
        return []
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping

    if not isinstance(model, PreTrainedModel):
        return []
    transforms: Sequence[WeightTransform] = get_model_conversion_mapping(model)
    return transforms


def _list_parameters(places: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return the parameters of modules by their paths, wrapped by a bank or not."""
    return {
        f"{path}.{name}": parameter
        for path, module in places.items()
        for name, parameter in list_own_parameters(module)
        if parameter is not None
    }


def _find_model_names(
    missing: Sequence[str],
    transforms: Sequence[WeightTransform],
    parameters: Mapping[str, nn.Parameter],
    places: Mapping[str, nn.Module],
) -> _ModelNames | None:
    """Return where the model has the modules that it does not know by name; None if it has no place for one."""
    from transformers.core_model_loading import WeightConverter

    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    names = _ModelNames()
    for path in missing:
        key = f"{path}.weight"
        for transform in transforms:
            if transform not in converters:
                key, _ = transform.rename_source_key(key)
        renamed = key.removesuffix(".weight")
        fused = None if renamed in places else _find_fused_part(key, converters, parameters, places)
        if fused is not None:
            names.parts[path] = fused
        elif renamed not in places:
            return None
        elif kind_of(places[renamed]) is None and f"{renamed}.weight" in parameters:
            names.parts[path] = _FusedPart(f"{renamed}.weight")
        else:
            names.renamed[path] = renamed
    return names


def _find_fused_part(
    key: str,
    converters: Sequence[WeightConverter],
    parameters: Mapping[str, nn.Parameter],
    places: Mapping[str, nn.Module],
) -> _FusedPart | None:
    """Return which part of which parameter a weight of an older transformers is; None if that is not known."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    for converter in converters:
        parameter, pattern = converter.rename_source_key(key)
        if pattern is None or parameter not in parameters:
            continue
        owner, parts = parameter.rpartition(".")[0], list(converter.source_patterns)
        expert = key.removeprefix(f"{owner}.").partition(".")[0]
        are_rows = all(
            (isinstance(operation, MergeModulelist) and operation.dim == 0)
            or (isinstance(operation, Concatenate) and operation.dim == 1)
            for operation in converter.operations
        )
        if are_rows and expert.isdecimal() and parameters[parameter].ndim == 3 and not is_transposed(places[owner]):
            return _FusedPart(parameter, int(expert), parts.index(pattern), len(parts))
    return None


# The adapter under those names


def _rename(adapter: Adapter, model: nn.Module, renamed: Mapping[str, str]) -> Adapter:
    """Return an adapter with other names of modules, and the same tensors."""
    old_paths = {renamed.get(path, path): path for path in adapter.all_pairs()}
    config = adapter.config
    targets = {target.key: (target.rank, target.scaling) for target in survey_coverage(model, config).targets}
    if targets != {new: (config.rank_of(old), config.scaling_of(old)) for new, old in old_paths.items()}:
        config = rename_config_paths(config, {old: new for new, old in old_paths.items()})
    saved = tuple(renamed.get(name, name) for name in config.modules_to_save)
    tensors = {PREFIX + _rename_key(key.removeprefix(PREFIX), renamed): t for key, t in adapter.tensors.items()}
    return Adapter(dataclasses.replace(config, modules_to_save=saved), tensors, record=adapter.record)


def _rename_key(key: str, renamed: Mapping[str, str]) -> str:
    """Return the key of a tensor of a renamed module; that of any other module as it is."""
    path = key
    while path not in renamed:
        path, dot, _ = path.rpartition(".")
        if not dot:
            return key
    return renamed[path] + key[len(path) :]


def _fuse(adapter: Adapter, model: nn.Module, names: _ModelNames, parameters: Mapping[str, nn.Parameter]) -> Adapter:
    """Return an adapter whose experts are parameters.

    All of it has the largest rank, filled up with zeros: PEFT reads no ranks and alphas of single parameters.
    """
    config, pairs = adapter.config, adapter.all_pairs()
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    scaled = {
        path: dataclasses.replace(pair, b=_scale(pair.b, config.scaling_of(path) / scaling))
        for path, pair in pairs.items()
    }
    parts: dict[str, dict[str, _FusedPart]] = {}
    for path, part in names.parts.items():
        parts.setdefault(part.parameter, {})[path] = part
    stacked = {path: _stack_experts(scaled, own, parameters[path].shape) for path, own in parts.items()}
    layers = {names.renamed.get(path, path): pair for path, pair in scaled.items() if path not in names.parts}
    rank = max([*(a.shape[1] for a, _ in stacked.values()), *(pair.a.shape[0] for pair in layers.values())])
    fused_config = dataclasses.replace(
        config,
        r=rank,
        lora_alpha=scaling * (math.sqrt(rank) if config.use_rslora else rank),
        lora_dropout=0.0,
        target_modules=tuple(layers),
        target_parameters=tuple(parts),
        rank_pattern={},
        alpha_pattern={},
        layers_to_transform=None,
        layers_pattern=None,
        exclude_modules=None,
    )
    keys = {target.path: target.key for target in survey_coverage(model, fused_config).targets}
    tensors = {
        PREFIX + _rename_key(key.removeprefix(PREFIX), names.renamed): tensor
        for key, tensor in adapter.tensors.items()
        if ".lora_" not in key
    }
    for path, pair in layers.items():
        sides = (_pad(pair.a, 0, rank), _pad(pair.b, 1, rank))
        tensors |= dict(zip(lora_weight_keys(path, pair.kind), sides, strict=True))
    for parameter, (a, b) in stacked.items():
        sides = (_pad(a, 1, rank).flatten(0, 1), _pad(b, 2, rank).permute(1, 2, 0).flatten(1).contiguous())
        tensors |= dict(zip(lora_weight_keys(keys.get(parameter, parameter), "linear"), sides, strict=True))
    return Adapter(fused_config, tensors, record=adapter.record)


def _stack_experts(
    pairs: Mapping[str, LoraWeights], parts: Mapping[str, _FusedPart], shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return A and B of each matrix of a parameter; zero where the adapter has no update.

    Args:
        pairs: of the adapter, by its paths.
        parts: those of this parameter, by the adapter's paths.
        shape: of the parameter, (experts, out, in) or (out, in).

    Returns:
        A (experts, r, in) and B (experts, out, r).

    Raises:
        AdapterError: LoRA weights of another shape than the rows of the parameter.
    """
    experts, height, width = (1, *shape)[-3:]
    present = sorted({part.part for part in parts.values()})
    first, rank = pairs[next(iter(parts))], max(pairs[path].a.shape[0] for path in parts)
    a = first.a.new_zeros(experts, rank * len(present), width)
    b = first.b.new_zeros(experts, height, rank * len(present))
    for path, part in parts.items():
        pair, rows = pairs[path], height // part.parts
        if part.expert >= experts or (pair.a.shape[1:], pair.b.shape[:1]) != ((width,), (rows,)):
            raise AdapterError(
                f"{path}: A {tuple(pair.a.shape)} B {tuple(pair.b.shape)}, but {part.parameter} has {experts} experts "
                f"of {width} inputs and {part.parts} times {rows} outputs"
            )
        row, column = part.part * rows, present.index(part.part) * rank
        a[part.expert, column : column + pair.a.shape[0]] = pair.a
        b[part.expert, row : row + rows, column : column + pair.b.shape[1]] = pair.b
    return a, b


def _scale(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor * factor


def _pad(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Return a tensor with zeros behind its values, of this size along an axis."""
    shape = list(tensor.shape)
    shape[axis] = size - shape[axis]
    return tensor if not shape[axis] else torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)
