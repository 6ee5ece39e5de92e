"""Which modules of a model a config covers, and a report of what was found."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from lora_kit.config import ALL_LINEAR, LoraConfig
from lora_kit.errors import TargetError, listed, nearest
from lora_kit.layers import SlotLayer, features_of, is_transposed, kind_of
from lora_kit.patterns import expression

_HEADS: Final = ("score", "classifier", "pre_classifier", "classification_head", "qa_outputs", "lm_head")
"""Names of output heads that `all-linear` leaves alone where they hang directly on the model."""
_ROUTERS: Final = frozenset({"gate", "router", "shared_expert_gate"})
"""Names of what chooses between the experts of a mixture; `all-linear` leaves them alone, and what is in them."""
_EXPERTS: Final = "experts"
_READ_BY_KERNELS: Final = ("x_proj", "dt_proj", "out_proj")
"""Linear layers of a state-space mixer (Mamba and its kin) whose weight it reads itself, always or on a GPU."""
_IN_SAVED: Final = "inside a saved module"

Modules = Sequence[tuple[str, nn.Module]]
"""Modules of a base with their paths."""


@dataclass(frozen=True)
class Target:
    """A layer that carries a pair: A (rank, in_features), B (out_features, rank).

    Attributes:
        kind: `linear`, `embedding` (in_features are its entries, out_features its dimension), `convolution` (they are
            its channels) or `parameter` (the path ends in its name).
        scaling: what `B A x` is multiplied by.
        dora: whether it has a magnitude (out_features,) as well.
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

    @property
    def key(self) -> str:
        """Its path in an adapter's file."""
        return self.stored or self.path

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
    """

    targets: tuple[Target, ...]
    saved: tuple[str, ...]
    saved_parameters: int
    skipped: tuple[tuple[str, str], ...]
    unmatched: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Trainable elements: pairs and saved modules."""
        return sum(target.parameters for target in self.targets) + self.saved_parameters

    def __str__(self) -> str:
        names: dict[str, list[Target]] = {}
        for target in self.targets:
            names.setdefault(target.path.rpartition(".")[2], []).append(target)
        lines = [
            f"{name}: {len(group)} layers, rank {listed(sorted({str(target.rank) for target in group}))}"
            for name, group in names.items()
        ]
        lines += [f"{path}: saved whole" for path in self.saved]
        lines += [f"{path}: left alone, {reason}" for path, reason in self.skipped]
        return "\n".join([*lines, f"{self.parameters:,} trainable parameters"])


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the base model: wrappers are seen as what they wrap, and what they add is not shown."""
    seen: set[nn.Module] = set()
    ahead: list[tuple[str, nn.Module]] = [("", model)]
    while ahead:
        path, module = ahead.pop()
        while isinstance(module, SlotLayer):
            module = module.base_layer
        if module not in seen:
            seen.add(module)
            yield path, module
            start = f"{path}." if path else ""
            ahead += [(start + name, child) for name, child in reversed(module._modules.items()) if child is not None]


def find(model: nn.Module, config: LoraConfig) -> Coverage:
    """The layers of a model that a config covers.

    Raises:
        TargetError: an entry of `target_modules`, `modules_to_save` or `layers_to_transform` matches nothing, or a
            matched module cannot carry a pair; says what the model has.
    """
    coverage = survey(model, config)
    if coverage.unmatched:
        paths = [path for path, _ in named_layers(model)]
        names = sorted({path.rpartition(".")[2] for path in paths} | set(paths))
        hint = nearest(coverage.unmatched[0], names) or f"the model has {listed(_linear_names(model), most=12)}"
        raise TargetError(f"nothing in the model matches {listed(coverage.unmatched)}", hint=hint)
    unfit = [f"{path}: {reason}" for path, reason in coverage.skipped]
    if unfit and config.target_modules != ALL_LINEAR:
        raise TargetError(
            f"these modules cannot carry a low-rank pair: {listed(unfit)}", hint="take them out of target_modules"
        )
    if not coverage.targets and not coverage.saved:
        raise TargetError(
            "the config covers no module of this model", hint=f"the model has {listed(_linear_names(model), most=12)}"
        )
    return coverage


def survey(model: nn.Module, config: LoraConfig) -> Coverage:
    """As `find`, but what does not match is told, not raised."""
    modules = list(named_layers(model))
    saved = _saved_paths(modules, config.modules_to_save)
    refused = dict.fromkeys(_inside(modules, saved), _IN_SAVED)
    refused |= _attention_internals(modules) | _mixer_internals(modules)
    targets, skipped = [], []
    for path, module in _selected(model, modules, config):
        kind = kind_of(module)
        if path in refused:
            if refused[path] != _IN_SAVED:
                skipped.append((path, refused[path]))
        elif kind is None:
            skipped.append((path, f"a {type(module).__name__} is not a linear layer or an embedding"))
        elif kind == "convolution" and _is_odd_convolution(module):
            skipped.append((path, "a convolution with groups, dilation or another padding than zeros"))
        elif config.use_dora and (kind != "linear" or not _has_float_weight(module)):
            skipped.append((path, "DoRA needs a linear layer whose weight is not quantised"))
        else:
            size_in, size_out = features_of(module)
            rank, scaling = config.rank_of(path), config.scaling_of(path)
            kernel = _kernel_of(module) if kind == "convolution" else ()
            targets.append(Target(path, kind, size_in, size_out, rank, scaling, config.use_dora, kernel=kernel))
    by_parameter, unfit = _parameters(modules, config, {target.path for target in targets})
    targets += by_parameter
    skipped += unfit
    names = {end for path, _ in modules for end in _ends(path)}
    unmatched = [name for name in _entries(config) if name not in names]
    unmatched += _missing_parameters(modules, config)
    if isinstance(config.target_modules, str) and len(targets) == len(by_parameter) and not skipped:
        unmatched.append(config.target_modules)
    unmatched += [name for name in config.modules_to_save if not any(name in _ends(path) for path in saved)]
    unmatched += _missing_indices(config, targets)
    by_path = dict(modules)
    count = sum(t.numel() for path in saved for t in by_path[path].parameters())
    return Coverage(tuple(targets), tuple(saved), count, tuple(skipped), tuple(unmatched))


def suffixes(model: nn.Module, coverage: Coverage) -> tuple[str, ...]:
    """The shortest list of names that selects exactly the covered layers of a model: last names, or whole paths."""
    covered = {target.path for target in coverage.targets if target.kind != "parameter"}
    names = {path.rpartition(".")[2] for path in covered}
    selected = {path for path, _ in named_layers(model) if not names.isdisjoint(_ends(path))}
    return tuple(sorted(names if selected == covered else covered))


def _parameters(
    modules: Modules, config: LoraConfig, covered: Collection[str]
) -> tuple[list[Target], list[tuple[str, str]]]:
    """The parameters that a config targets; and of those that cannot have pairs (path, reason)."""
    targets, skipped, named = list[Target](), list[tuple[str, str]](), _matcher(config.target_parameters)
    for module_path, module in modules if config.target_parameters else ():
        found = [(name, weight) for name, weight in module._parameters.items() if named(f"{module_path}.{name}")]
        found = found if module_path else []  # there is nothing that a wrapper of the whole model could be put into
        for inside, (name, weight) in enumerate(found):
            path = f"{module_path}.{name}"
            if module_path in covered or weight is None or weight.ndim not in (2, 3) or not weight.is_floating_point():
                told = "its module has pairs already" if module_path in covered else "it is no matrix, nor several"
                skipped.append((path, told))
                continue
            swapped = weight.ndim == 3 and is_transposed(module)
            size_in, size_out = weight.shape[-2:] if swapped else weight.shape[-2:][::-1]
            # PEFT wraps the last parameter outermost.
            stored = module_path + ".base_layer" * (len(found) - 1 - inside)
            count = weight.shape[0] if weight.ndim == 3 else 1
            rank, scaling = config.rank_of(path), config.scaling_of(path)
            targets.append(Target(path, "parameter", size_in, size_out, rank, scaling, experts=count, stored=stored))
    return targets, skipped


def _missing_parameters(modules: Modules, config: LoraConfig) -> list[str]:
    if not config.target_parameters:
        return []
    ends = {end for path, module in modules for name in module._parameters for end in _ends(f"{path}.{name}")}
    return [name for name in config.target_parameters if name not in ends]


def _entries(config: LoraConfig) -> tuple[str, ...]:
    return config.target_modules if isinstance(config.target_modules, tuple) else ()


def _ends(path: str) -> list[str]:
    """The names a module goes by: its path, and what is left of it after each dot."""
    found = [path]
    while "." in path:
        path = path.partition(".")[2]
        found.append(path)
    return found


def _within(path: str, top: str) -> bool:
    return path == top or path.startswith(top + ".")


def _inside(modules: Modules, tops: Sequence[str]) -> set[str]:
    """Paths of these modules and of everything in them."""
    return {path for path, _ in modules if any(_within(path, top) for top in tops)} if tops else set()


def _matcher(patterns: str | Sequence[str] | None) -> Callable[[str], bool]:
    """Whether a path is matched by one regular expression, or by one of these names."""
    if isinstance(patterns, str):
        return expression(patterns).matches
    names = frozenset(patterns or ())
    return lambda path: not names.isdisjoint(_ends(path))


def _selected(model: nn.Module, modules: Modules, config: LoraConfig) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a config names, whether or not they can carry a pair."""
    everything, by_expression = config.target_modules == ALL_LINEAR, isinstance(config.target_modules, str)
    left_alone = _heads(model, modules) | _routers(modules) if everything else set()
    covered, excluded = _matcher(None if everything else config.target_modules), _matcher(config.exclude_modules)
    whole = frozenset(_entries(config))
    for path, module in modules:
        found = kind_of(module) == "linear" and path not in left_alone if everything else covered(path)
        # An expression and a whole path say which layer they mean.
        chosen = (by_expression and not everything) or path in whole
        if path and found and not excluded(path) and (chosen or _layer_chosen(path, config)):
            yield path, module


def _layer_index(path: str, patterns: Sequence[str] | None) -> int | None:
    """The number of the layer a module belongs to: the first number after a list of that name, or after any name."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", path) if not patterns else None
    for pattern in patterns or ():
        found = found or re.match(rf"(?:^|.*?\.){re.escape(pattern)}\.(\d+)\.", path)
    return int(found.group(1)) if found else None


def _layer_chosen(path: str, config: LoraConfig) -> bool:
    if config.layers_to_transform is None:
        return True
    return _layer_index(path, config.layers_pattern) in config.layers_to_transform


def _missing_indices(config: LoraConfig, targets: Sequence[Target]) -> list[str]:
    if config.layers_to_transform is None:
        return []
    present = {_layer_index(target.path, config.layers_pattern) for target in targets}
    return [f"layers_to_transform={index}" for index in config.layers_to_transform if index not in present]


def _saved_paths(modules: Modules, names: Sequence[str]) -> list[str]:
    """Paths of the modules named, those inside another left out."""
    named, paths = _matcher(names), list[str]()
    for path, _ in modules:
        if named(path) and not any(_within(path, top) for top in paths):
            paths.append(path)
    return paths


def _attention_internals(modules: Modules) -> dict[str, str]:
    tops = [path for path, module in modules if isinstance(module, nn.MultiheadAttention)]
    return dict.fromkeys(_inside(modules, tops), "nn.MultiheadAttention reads its weight directly, past any wrapper")


def _mixer_internals(modules: Modules) -> dict[str, str]:
    mixers = {path for path, module in modules if {"A_log", "D"} <= module._parameters.keys()}
    read = {f"{mixer}.{name}" for mixer in mixers for name in _READ_BY_KERNELS}
    paths = [path for path, _ in modules if path in read]
    return dict.fromkeys(paths, "a state-space mixer reads its weight directly, past any wrapper")


def _heads(model: nn.Module, modules: Modules) -> set[str]:
    """Paths inside the output head of a model."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    output = output.base_layer if isinstance(output, SlotLayer) else output
    return _inside(modules, [path for path, module in modules if path and (module is output or path in _HEADS)])


def _routers(modules: Modules) -> set[str]:
    """Paths of the routers of mixtures, which stand beside their experts, and of everything in them."""
    mixtures = {path.rpartition(".")[0] for path, _ in modules if path.rpartition(".")[2] == _EXPERTS}
    split = ((path, *path.rpartition(".")) for path, _ in modules)
    return _inside(modules, [path for path, parent, _, name in split if name in _ROUTERS and parent in mixtures])


def is_of_an_expert(path: str) -> bool:
    """Whether a module belongs to one expert of a mixture, and so is given the tokens sent there, not a batch."""
    return _EXPERTS in path.split(".")[:-1]


def _kernel_of(module: Any) -> tuple[int, ...]:
    return tuple(module.kernel_size)


def _is_odd_convolution(module: Any) -> bool:
    return module.groups > 1 or set(module.dilation) != {1} or module.padding_mode != "zeros"


def _has_float_weight(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.is_floating_point()


def _linear_names(model: nn.Module) -> list[str]:
    return sorted({path.rpartition(".")[2] for path, module in named_layers(model) if kind_of(module)})
