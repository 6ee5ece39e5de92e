"""Which modules of a model a config covers, and what in the config matches nothing."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import nn

from lora_kit.adapter.adapter import Adapter
from lora_kit.config.lora_config import ALL_LINEAR, LoraConfig
from lora_kit.config.module_patterns import NamedEnds
from lora_kit.config.peft_fields import INITS_OF_PEFT
from lora_kit.errors import ConfigError, TargetError, format_list, suggest_nearest
from lora_kit.layers.experts import list_own_parameters
from lora_kit.layers.introspect import (
    features_of,
    find_module,
    is_quantized,
    is_unquantized,
    kind_of,
)
from lora_kit.layers.parameter import is_transposed
from lora_kit.targets.bypassed_layers import find_bypassed_layers
from lora_kit.targets.layer_target import LayerTarget
from lora_kit.targets.match import (
    Modules,
    find_missing_indices,
    find_paths_inside,
    find_saved_paths,
    find_saved_paths_of_file,
    is_within,
    make_matcher,
    named_layers,
    select_modules,
    target_names_of,
)
from lora_kit.targets.token_rows import TokenTarget, find_tied_paths, find_token_coverage
from lora_kit.targets.trainable_layers import reason_not_trainable

_PROBLEMS_SHOWN: Final = 4
_NAMES_SHOWN: Final = 12

Skipped = list[tuple[str, str]]
"""(path, reason) of modules or parameters that a pattern names but that cannot have LoRA weights."""


@dataclass(frozen=True)
class Coverage:
    """What a config covers in a model.

    Attributes:
        targets: layers with LoRA weights, in the model's order.
        saved: paths of the modules in `modules_to_save`.
        saved_parameters: elements of the tensors of `saved`.
        skipped: (path, reason) of modules that a pattern names but that cannot have LoRA weights.
        unmatched: entries of the config that name no module.
        tokens: embeddings and heads of which some rows are trained.
        problems: other mismatches of config and model, one message each.
    """

    targets: tuple[LayerTarget, ...]
    saved: tuple[str, ...]
    saved_parameters: int
    skipped: tuple[tuple[str, str], ...]
    unmatched: tuple[str, ...]
    tokens: tuple[TokenTarget, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Trainable elements: LoRA weights, `modules_to_save` and token embeddings."""
        own = [target.parameters for target in self.targets] + [target.parameters for target in self.tokens]
        return sum(own) + self.saved_parameters

    @property
    def replaced(self) -> tuple[str, ...]:
        """Paths of modules whose weights, or some rows of them, the adapter has in place of the base's."""
        return (*self.saved, *(path for target in self.tokens for path in target.all_paths))

    def __str__(self) -> str:
        names: dict[str, list[LayerTarget]] = {}
        for target in self.targets:
            names.setdefault(target.path.rpartition(".")[2], []).append(target)
        lines = [
            f"{name}: {len(group)} layers, rank {format_list(sorted({str(target.rank) for target in group}))}"
            for name, group in names.items()
        ]
        lines += [f"{path}: saved in full" for path in self.saved]
        lines += [f"{' and '.join(target.all_paths)}: rows of {len(target.indices)} tokens" for target in self.tokens]
        lines += [f"{path}: skipped, {reason}" for path, reason in self.skipped]
        return "\n".join([*lines, f"{self.parameters:,} trainable parameters"])


def find_coverage(model: nn.Module, config: LoraConfig) -> Coverage:
    """Return what a config covers in a model.

    Raises:
        ConfigError: `init_lora_weights` is one of PEFT's alone.
        TargetError: an entry of `target_modules`, `modules_to_save` or `layers_to_transform` matches nothing, or a
            matched module cannot have LoRA weights. The hint lists what the model has.
    """
    if config.init_lora_weights in INITS_OF_PEFT:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights} is not supported in training",
            hint="train it in PEFT, or use init_lora_weights: true",
        )
    coverage = survey_coverage(model, config)
    if coverage.unmatched:
        paths = [path for path, _ in named_layers(model)]
        names = sorted({path.rpartition(".")[2] for path in paths} | set(paths))
        hint = suggest_nearest(coverage.unmatched[0], names) or _list_layer_names(model)
        raise TargetError(f"nothing in the model matches {format_list(coverage.unmatched)}", hint=hint)
    if coverage.problems:
        problems = "; ".join(coverage.problems[:_PROBLEMS_SHOWN])
        raise TargetError(f"the config does not match the model: {problems}")
    _refuse_weight_tying(model, config, coverage)
    quantized = [path for path in coverage.saved if is_quantized(find_module(model, path))]
    if quantized:
        raise TargetError(
            f"quantized modules cannot be in modules_to_save: {format_list(quantized)}",
            hint="name them in target_modules instead",
        )
    is_empty = not coverage.targets and not coverage.saved and not coverage.tokens
    if coverage.skipped and (is_empty or config.target_modules != ALL_LINEAR):
        skipped = format_list([f"{path}: {reason}" for path, reason in coverage.skipped])
        raise TargetError(f"these modules cannot have LoRA weights: {skipped}", hint="take them out of target_modules")
    if is_empty:
        raise TargetError("the config covers no module of this model", hint=_list_layer_names(model))
    return coverage


def _refuse_weight_tying(model: nn.Module, config: LoraConfig, coverage: Coverage) -> None:
    """Raise TargetError where layers would have to be trained as one (`ensure_weight_tying`)."""
    tied = find_tied_paths(model, list(named_layers(model))) if config.ties_weights else []
    covered = {*coverage.saved, *(target.path for target in coverage.targets)}
    if len(tied) > 1 and not covered.isdisjoint(tied):
        raise TargetError(
            f"ensure_weight_tying=True is not supported in training: {format_list(tied)} would be trained apart",
            hint="train with `method: peft`, or train token embeddings (trainable_token_indices), which are tied",
        )


def survey_coverage(model: nn.Module, config: LoraConfig) -> Coverage:
    """Return what a config covers in a model. What does not match is listed in the result instead of raised."""
    modules = list(named_layers(model))
    return _survey(model, modules, config, find_saved_paths(modules, config.modules_to_save))


def survey_adapter(model: nn.Module, adapter: Adapter, modules: Modules | None = None) -> Coverage:
    """Return what an adapter covers in a model: its config, where its tensors decide what the config leaves open.

    The config does not say whether a name in `modules_to_save` was matched as a whole, nor with what the input
    embedding is tied (`ensure_weight_tying`).

    Args:
        modules: those of the model, where the caller has listed them.
    """
    modules, config = list(named_layers(model)) if modules is None else modules, adapter.config
    saved = find_saved_paths_of_file(modules, config.modules_to_save, adapter.saved())
    tied = find_tied_paths(model, modules) if config.ties_weights else []
    saved += [path for path in tied if path not in saved and any(is_within(key, path) for key in adapter.saved())]
    with_lora = [path for path in tied if path in adapter.all_pairs()]
    return _survey(model, modules, config, saved, tied=with_lora, training=False)


def _survey(
    model: nn.Module,
    modules: Modules,
    config: LoraConfig,
    saved: Sequence[str],
    *,
    tied: Sequence[str] = (),
    training: bool = True,
) -> Coverage:
    """Return what a config covers.

    Args:
        saved: paths of the modules in `modules_to_save`.
        tied: paths of layers that share the input embedding's weight, and so have LoRA weights where it has.
        training: whether the adapter is to be trained; else it is only used.
    """
    bypassed = find_bypassed_layers(modules, training=training)
    layers, skipped = _find_layers(model, modules, config, saved, tied, bypassed)
    parameters, skipped_parameters = _find_parameters(modules, config, {target.path for target in layers})
    tokens = find_token_coverage(model, modules, config)
    targets, skipped = [*layers, *parameters], [*skipped, *skipped_parameters]
    unmatched = _find_unmatched_names(modules, config)
    if isinstance(config.target_modules, str) and not layers and not skipped:
        unmatched.append(config.target_modules)
    unmatched += [*find_missing_indices(config, (target.path for target in targets)), *tokens.unmatched]
    by_path = dict(modules)
    replaced = [*saved, *(path for target in tokens.targets for path in target.all_paths)]
    return Coverage(
        targets=tuple(targets),
        saved=tuple(saved),
        saved_parameters=sum(tensor.numel() for path in saved for tensor in by_path[path].parameters()),
        skipped=tuple(skipped),
        unmatched=tuple(unmatched),
        tokens=tokens.targets,
        problems=(*tokens.problems, *_find_clashes(tokens.targets, targets, saved), *_find_unused(bypassed, replaced)),
    )


def find_shortest_names(model: nn.Module, coverage: Coverage) -> str | tuple[str, ...]:
    """Return what selects exactly the covered layers: last names, else whole paths, else an expression.

    A whole path selects every module whose path ends in it, too, so it may select more.
    """
    covered = {target.path for target in coverage.targets if target.kind != "parameter"}
    paths = [path for path, _ in named_layers(model)]
    for names in ({path.rpartition(".")[2] for path in covered}, covered):
        ends = NamedEnds(names)
        if {path for path in paths if ends.find(path)} == covered:
            return tuple(sorted(names))
    escaped = {path: re.escape(path) for path in sorted(covered)}
    # With any number for each number it is short; it may select more, though.
    short = "|".join(sorted({re.sub(r"\d+", r"\\d+", each) for each in escaped.values()}))
    return short if {path for path in paths if re.fullmatch(short, path)} == covered else "|".join(escaped.values())


def _find_layers(
    model: nn.Module,
    modules: Modules,
    config: LoraConfig,
    saved: Sequence[str],
    tied: Sequence[str],
    bypassed: Mapping[str, str],
) -> tuple[list[LayerTarget], Skipped]:
    """Return the layers that `target_modules` selects outside `modules_to_save`, and those that it cannot train.

    Args:
        bypassed: reasons why layers cannot be wrapped, by path.
    """
    targets, skipped = list[LayerTarget](), Skipped()
    selected = dict(select_modules(model, modules, config))
    selected |= {path: module for path, module in modules if path in tied}
    in_saved = find_paths_inside(modules, saved)
    for path, module in selected.items():
        if path in in_saved and path not in bypassed:
            continue
        reason = bypassed.get(path) or reason_not_trainable(module, config)
        if reason is not None:
            skipped.append((path, reason))
        else:
            targets.append(_make_layer_target(path, module, config))
    return targets, skipped


def _make_layer_target(path: str, module: nn.Module, config: LoraConfig) -> LayerTarget:
    in_features, out_features = features_of(module)
    return LayerTarget(
        path,
        str(kind_of(module)),
        in_features,
        out_features,
        config.rank_of(path),
        config.scaling_of(path),
        dora=config.use_dora,
        kernel=tuple(module.kernel_size) if isinstance(module, (nn.Conv1d, nn.Conv2d)) else (),
        starts_from_weight=config.starts_from_weight,
    )


def _find_parameters(
    modules: Modules, config: LoraConfig, covered: Collection[str]
) -> tuple[list[LayerTarget], Skipped]:
    """Return the parameters that `target_parameters` names, and those of them that cannot have LoRA weights.

    Args:
        covered: paths of modules that `target_modules` covers already.
    """
    targets, skipped, is_named = list[LayerTarget](), Skipped(), make_matcher(config.target_parameters)
    # A parameter of the model itself (path "") cannot be wrapped: there is no parent to put the wrapper into.
    for module_path, module in ((path, module) for path, module in modules if path and config.target_parameters):
        selected = [(name, weight) for name, weight in list_own_parameters(module) if is_named(f"{module_path}.{name}")]
        for index, (name, weight) in enumerate(selected):
            path = f"{module_path}.{name}"
            if module_path in covered:
                skipped.append((path, "its module has LoRA weights already"))
            elif weight is None or weight.ndim not in (2, 3) or not is_unquantized(weight):
                skipped.append((path, "it is not an unquantized matrix, or a stack of them"))
            else:
                # PEFT wraps the last parameter outermost.
                stored_path = module_path + ".base_layer" * (len(selected) - 1 - index)
                is_swapped = weight.ndim == 3 and is_transposed(module)
                targets.append(_make_parameter_target(path, weight, config, stored_path, is_swapped=is_swapped))
    return targets, skipped


def _make_parameter_target(
    path: str, weight: nn.Parameter, config: LoraConfig, stored_path: str, *, is_swapped: bool
) -> LayerTarget:
    """Return the target of a matrix (out, in), or of a stack (experts, out, in); (in, out) where `is_swapped`."""
    in_features, out_features = weight.shape[-2:] if is_swapped else weight.shape[-2:][::-1]
    return LayerTarget(
        path,
        "parameter",
        in_features,
        out_features,
        config.rank_of(path),
        config.scaling_of(path),
        experts=weight.shape[0] if weight.ndim == 3 else 1,
        stored_path=stored_path,
    )


def _find_unmatched_names(modules: Modules, config: LoraConfig) -> list[str]:
    """Return the names in `target_modules`, `target_parameters` and `modules_to_save` that nothing in the model has."""
    names, ends = target_names_of(config), NamedEnds(target_names_of(config))
    found = {name for path, _ in modules for name in ends.find(path)}
    unmatched = [name for name in names if name not in found]
    if config.target_parameters:
        ends = NamedEnds(config.target_parameters)
        paths = (f"{path}.{name}" for path, module in modules for name in module._parameters)
        found = {name for path in paths for name in ends.find(path)}
        unmatched += [name for name in config.target_parameters if name not in found]
    lengths = {len(name) for name in config.modules_to_save}
    endings = {path[-length:] for path, _ in modules for length in lengths}
    return unmatched + [name for name in dict.fromkeys(config.modules_to_save) if name not in endings]


def _find_clashes(tokens: Sequence[TokenTarget], targets: Sequence[LayerTarget], saved: Sequence[str]) -> Iterator[str]:
    """Yield what else an adapter would change of a weight whose rows it trains. PEFT does not support that either."""
    with_lora = {target.path for target in targets}
    for path in (path for target in tokens for path in target.all_paths):
        if path in with_lora:
            yield f"{path} has LoRA weights as well; take it out of target_modules"
        if any(is_within(path, top) for top in saved):
            yield f"{path} is saved in full as well; take it out of modules_to_save"


def _find_unused(bypassed: Mapping[str, str], replaced: Sequence[str]) -> Iterator[str]:
    """Yield which modules an adapter would replace without effect."""
    yield from (f"{path}: {bypassed[path]}" for path in replaced if path in bypassed)


def _list_layer_names(model: nn.Module) -> str:
    """Return a hint with the last names of the layers that can have LoRA weights."""
    names = sorted({path.rpartition(".")[2] for path, module in named_layers(model) if kind_of(module)})
    return f"the model has {format_list(names, most=_NAMES_SHOWN)}"
