"""Which modules of a model a config covers, and a report of what was found."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from lora_kit.config.lora_config import ALL_LINEAR, LoraConfig
from lora_kit.config.module_patterns import suffixes_of
from lora_kit.errors import TargetError, format_list, suggest_nearest
from lora_kit.layers.experts import list_own_parameters
from lora_kit.layers.introspect import features_of, is_quantized, is_unquantized, kind_of
from lora_kit.layers.parameter import is_transposed
from lora_kit.targets.match import (
    Modules,
    find_attention_internals,
    find_missing_indices,
    find_mixer_internals,
    find_paths_inside,
    find_saved_paths,
    is_within,
    make_matcher,
    named_layers,
    select_modules,
    target_names_of,
)
from lora_kit.targets.token_rows import TokenTarget, find_token_coverage

_PROBLEMS_SHOWN: Final = 4
_IN_SAVED: Final = "inside a saved module"


@dataclass(frozen=True)
class LayerTarget:
    """A layer that carries a pair: A (rank, in_features), B (out_features, rank).

    Attributes:
        kind: `linear`, `embedding` (in_features are its entries, out_features its dimension), `convolution` (they are
            its channels) or `parameter` (the path ends in its name).
        scaling: what `B A x` is multiplied by.
        dora: whether it has a magnitude (out_features,) as well.
        started: whether it starts from the layer's weight, so that it is saved, and held, with twice the rank.
        experts: matrices of a parameter, each with a pair of its own.
        kernel: size of a convolution's, else empty.
        stored: what an adapter's file calls a parameter; empty for others, which go by their path.
    """

    path: str
    kind: str
    in_features: int
    out_features: int
    rank: int
    scaling: float
    dora: bool = False
    experts: int = 1
    kernel: tuple[int, ...] = ()
    stored: str = ""
    started: bool = False

    @property
    def key(self) -> str:
        """Its path in an adapter's file."""
        return self.stored or self.path

    @property
    def room(self) -> int:
        """The rank that a slab needs for it."""
        return 2 * self.rank if self.started else self.rank

    @property
    def rows(self) -> int:
        """Rows of A: the rank, once for each expert."""
        return self.rank * self.experts

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and B."""
        return (self.rows, self.in_features, *self.kernel), (self.out_features, self.rows, *[1] * len(self.kernel))

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes) + (self.out_features if self.dora else 0)


@dataclass(frozen=True)
class Coverage:
    """What a config covers in a model.

    Attributes:
        targets: layers that carry a pair, in the model's order.
        saved: paths of the modules replaced as a whole.
        saved_parameters: elements of the tensors of `saved`.
        skipped: (path, reason) of modules that a pattern names but that carry nothing.
        unmatched: entries of the config that name no module.
        tokens: embeddings and heads of which some rows are trained.
        problems: what in the config does not fit the model besides, in words.
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
        """Trainable elements: pairs, saved modules and rows of tokens."""
        own = [target.parameters for target in self.targets] + [target.parameters for target in self.tokens]
        return sum(own) + self.saved_parameters

    @property
    def replaced(self) -> tuple[str, ...]:
        """Paths of modules of which the adapter has weights of its own in place of the base's."""
        return (*self.saved, *(path for target in self.tokens for path in target.all_paths))

    def __str__(self) -> str:
        names: dict[str, list[LayerTarget]] = {}
        for target in self.targets:
            names.setdefault(target.path.rpartition(".")[2], []).append(target)
        lines = [
            f"{name}: {len(group)} layers, rank {format_list(sorted({str(target.rank) for target in group}))}"
            for name, group in names.items()
        ]
        lines += [f"{path}: saved whole" for path in self.saved]
        lines += [f"{' and '.join(target.all_paths)}: rows of {len(target.indices)} tokens" for target in self.tokens]
        lines += [f"{path}: left alone, {reason}" for path, reason in self.skipped]
        return "\n".join([*lines, f"{self.parameters:,} trainable parameters"])


def find_coverage(model: nn.Module, config: LoraConfig) -> Coverage:
    """The layers of a model that a config covers.

    Raises:
        TargetError: an entry of `target_modules`, `modules_to_save` or `layers_to_transform` matches nothing, or a
            matched module cannot carry a pair; says what the model has.
    """
    coverage = survey_coverage(model, config)
    if coverage.unmatched:
        paths = [path for path, _ in named_layers(model)]
        names = sorted({path.rpartition(".")[2] for path in paths} | set(paths))
        hint = (
            suggest_nearest(coverage.unmatched[0], names)
            or f"the model has {format_list(_list_linear_names(model), most=12)}"
        )
        raise TargetError(f"nothing in the model matches {format_list(coverage.unmatched)}", hint=hint)
    if coverage.problems:
        raise TargetError("trainable_token_indices does not fit: " + "; ".join(coverage.problems[:_PROBLEMS_SHOWN]))
    codes = [path for path in coverage.saved if is_quantized(model.get_submodule(path))]
    if codes:
        raise TargetError(
            f"quantised, and so not to be trained whole: {format_list(codes)}",
            hint="put pairs there with target_modules",
        )
    unfit = [f"{path}: {reason}" for path, reason in coverage.skipped]
    if unfit and config.target_modules != ALL_LINEAR:
        raise TargetError(
            f"these modules cannot carry a low-rank pair: {format_list(unfit)}", hint="take them out of target_modules"
        )
    if not coverage.targets and not coverage.saved and not coverage.tokens:
        raise TargetError(
            "the config covers no module of this model",
            hint=f"the model has {format_list(_list_linear_names(model), most=12)}",
        )
    return coverage


def survey_coverage(model: nn.Module, config: LoraConfig) -> Coverage:
    """As `find`, but what does not match is told, not raised."""
    modules = list(named_layers(model))
    saved = find_saved_paths(modules, config.modules_to_save)
    refused = dict.fromkeys(find_paths_inside(modules, saved), _IN_SAVED)
    refused |= find_attention_internals(modules) | find_mixer_internals(modules)
    targets, skipped = [], []
    for path, module in select_modules(model, modules, config):
        kind = kind_of(module)
        if path in refused:
            if refused[path] != _IN_SAVED:
                skipped.append((path, refused[path]))
        elif kind is None:
            skipped.append((path, f"a {type(module).__name__} is not a linear layer or an embedding"))
        elif kind == "convolution" and _is_unsupported_convolution(module):
            skipped.append((path, "a convolution with groups, dilation or another padding than zeros"))
        elif config.use_dora and (kind != "linear" or not _has_float_weight(module)):
            skipped.append((path, "DoRA needs a linear layer whose weight is not quantised"))
        elif config.starts_from_weight and kind != "linear":
            skipped.append((path, f"init_lora_weights={config.init_lora_weights} is for linear layers"))
        else:
            size_in, size_out = features_of(module)
            rank, scaling = config.rank_of(path), config.scaling_of(path)
            kernel = _kernel_of(module) if kind == "convolution" else ()
            how: dict[str, Any] = {"dora": config.use_dora, "started": config.starts_from_weight, "kernel": kernel}
            targets.append(LayerTarget(path, kind, size_in, size_out, rank, scaling, **how))
    by_parameter, unfit = _find_parameters(modules, config, {target.path for target in targets})
    targets += by_parameter
    skipped += unfit
    names = {end for path, _ in modules for end in suffixes_of(path)}
    unmatched = [name for name in target_names_of(config) if name not in names]
    unmatched += _find_missing_parameters(modules, config)
    if isinstance(config.target_modules, str) and len(targets) == len(by_parameter) and not skipped:
        unmatched.append(config.target_modules)
    unmatched += [name for name in config.modules_to_save if not any(name in suffixes_of(path) for path in saved)]
    unmatched += find_missing_indices(config, (target.path for target in targets))
    by_path = dict(modules)
    count = sum(t.numel() for path in saved for t in by_path[path].parameters())
    tokens = find_token_coverage(model, modules, config)
    problems = [*tokens.problems, *_find_clashes(tokens.targets, targets, saved)]
    unmatched += tokens.unmatched
    return Coverage(
        tuple(targets), tuple(saved), count, tuple(skipped), tuple(unmatched), tokens.targets, tuple(problems)
    )


def _find_clashes(tokens: Sequence[TokenTarget], targets: Sequence[LayerTarget], saved: Sequence[str]) -> Iterator[str]:
    """What else an adapter would change of a weight whose rows it trains; PEFT does not compute such a one either."""
    with_pairs = {target.path for target in targets}
    for path in (path for target in tokens for path in target.all_paths):
        if path in with_pairs:
            yield f"{path} has a pair as well; take it out of target_modules"
        if any(is_within(path, top) for top in saved):
            yield f"{path} is saved whole as well; take it out of modules_to_save"


def find_shortest_names(model: nn.Module, coverage: Coverage) -> tuple[str, ...]:
    """The shortest list of names that selects exactly the covered layers of a model: last names, or whole paths."""
    covered = {target.path for target in coverage.targets if target.kind != "parameter"}
    names = {path.rpartition(".")[2] for path in covered}
    selected = {path for path, _ in named_layers(model) if not names.isdisjoint(suffixes_of(path))}
    return tuple(sorted(names if selected == covered else covered))


def _find_parameters(
    modules: Modules, config: LoraConfig, covered: Collection[str]
) -> tuple[list[LayerTarget], list[tuple[str, str]]]:
    """The parameters that a config targets; and of those that cannot have pairs (path, reason)."""
    targets, skipped, named = list[LayerTarget](), list[tuple[str, str]](), make_matcher(config.target_parameters)
    for module_path, module in modules if config.target_parameters else ():
        found = [(name, weight) for name, weight in list_own_parameters(module) if named(f"{module_path}.{name}")]
        found = found if module_path else []  # there is nothing that a wrapper of the whole model could be put into
        for inside, (name, weight) in enumerate(found):
            path = f"{module_path}.{name}"
            if module_path in covered or weight is None or weight.ndim not in (2, 3) or not is_unquantized(weight):
                told = "its module has pairs already" if module_path in covered else "it is no matrix, nor several"
                skipped.append((path, told))
                continue
            swapped = weight.ndim == 3 and is_transposed(module)
            size_in, size_out = weight.shape[-2:] if swapped else weight.shape[-2:][::-1]
            # PEFT wraps the last parameter outermost.
            stored = module_path + ".base_layer" * (len(found) - 1 - inside)
            count = weight.shape[0] if weight.ndim == 3 else 1
            rank, scaling = config.rank_of(path), config.scaling_of(path)
            targets.append(
                LayerTarget(path, "parameter", size_in, size_out, rank, scaling, experts=count, stored=stored)
            )
    return targets, skipped


def _find_missing_parameters(modules: Modules, config: LoraConfig) -> list[str]:
    if not config.target_parameters:
        return []
    known = {end for path, module in modules for name in module._parameters for end in suffixes_of(f"{path}.{name}")}
    return [name for name in config.target_parameters if name not in known]


def _kernel_of(module: Any) -> tuple[int, ...]:
    return tuple(module.kernel_size)


def _is_unsupported_convolution(module: Any) -> bool:
    return module.groups > 1 or set(module.dilation) != {1} or module.padding_mode != "zeros"


def _has_float_weight(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and is_unquantized(weight)


def _list_linear_names(model: nn.Module) -> list[str]:
    return sorted({path.rpartition(".")[2] for path, module in named_layers(model) if kind_of(module)})
