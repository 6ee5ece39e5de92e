"""Which modules of a model a config covers, and a report of what was found."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from lora_kit.config import ALL_LINEAR, LoraConfig
from lora_kit.errors import TargetError, listed, nearest
from lora_kit.layers import SlotLayer, features_of, kind_of
from lora_kit.patterns import matches

_HEADS = ("score", "classifier", "qa_outputs", "lm_head")
"""Names of output heads that `all-linear` leaves alone where they hang directly on the model."""


@dataclass(frozen=True)
class Target:
    """A layer that carries a pair: A (rank, in_features), B (out_features, rank).

    Attributes:
        kind: `linear` or `embedding` (in_features are its entries, out_features its dimension).
        scaling: what `B A x` is multiplied by.
        dora: whether it has a magnitude (out_features,) as well.
    """

    path: str
    kind: str
    in_features: int
    out_features: int
    rank: int
    scaling: float
    dora: bool = False

    @property
    def parameters(self) -> int:
        return self.rank * (self.in_features + self.out_features) + (self.out_features if self.dora else 0)


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
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if inside and path.startswith(inside):
            continue
        if isinstance(module, SlotLayer):
            inside = (f"{path}.",)
            yield path, module.base_layer
            for below, child in module.base_layer.named_modules():
                if below:
                    yield f"{path}.{below}", child
        else:
            yield path, module


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
    refused = {path: "inside a saved module" for path, _ in modules if any(_within(path, top) for top in saved)}
    refused |= _attention_internals(modules)
    heads = _heads(model, modules) if config.target_modules == ALL_LINEAR else set()
    targets, skipped = [], []
    for path, module in modules:
        if not path or path in heads or not _selected(path, module, config):
            continue
        kind = kind_of(module)
        if path in refused:
            if refused[path] != "inside a saved module":
                skipped.append((path, refused[path]))
        elif kind is None:
            skipped.append((path, f"a {type(module).__name__} is not a linear layer or an embedding"))
        elif config.use_dora and (kind == "embedding" or not _has_float_weight(module)):
            skipped.append((path, "DoRA needs a linear layer whose weight is not quantised"))
        else:
            size_in, size_out = features_of(module)
            rank, scaling = config.rank_of(path), config.scaling_of(path)
            targets.append(Target(path, kind, size_in, size_out, rank, scaling, config.use_dora))
    unmatched = [name for name in _entries(config) if not any(_is_named(path, name) for path, _ in modules)]
    if isinstance(config.target_modules, str) and not targets and not skipped:
        unmatched.append(config.target_modules)
    unmatched += [name for name in config.modules_to_save if not any(_is_named(path, name) for path in saved)]
    unmatched += _missing_indices(config, targets)
    by_path = dict(modules)
    count = sum(t.numel() for path in saved for t in by_path[path].parameters())
    return Coverage(tuple(targets), tuple(saved), count, tuple(skipped), tuple(unmatched))


def suffixes(model: nn.Module, coverage: Coverage) -> tuple[str, ...]:
    """The shortest list of names that selects exactly the covered layers of a model: last names, or whole paths."""
    covered = {target.path for target in coverage.targets}
    names = sorted({path.rpartition(".")[2] for path in covered})
    selected = {path for path, _ in named_layers(model) if any(_is_named(path, name) for name in names)}
    return tuple(names if selected == covered else sorted(covered))


def _entries(config: LoraConfig) -> tuple[str, ...]:
    return config.target_modules if isinstance(config.target_modules, tuple) else ()


def _is_named(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _within(path: str, top: str) -> bool:
    return path == top or path.startswith(top + ".")


def _matched(path: str, patterns: str | Sequence[str] | None) -> bool:
    if patterns is None:
        return False
    if isinstance(patterns, str):
        return matches(patterns, path)
    return any(_is_named(path, name) for name in patterns)


def _selected(path: str, module: nn.Module, config: LoraConfig) -> bool:
    if _matched(path, config.exclude_modules):
        return False
    if config.target_modules == ALL_LINEAR:
        return kind_of(module) == "linear" and _layer_chosen(path, config)
    if isinstance(config.target_modules, str):
        return matches(config.target_modules, path)
    return _matched(path, config.target_modules) and (path in _entries(config) or _layer_chosen(path, config))


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
    present = {_layer_index(target.path, config.layers_pattern) for target in targets}
    return [f"layers_to_transform={index}" for index in config.layers_to_transform or () if index not in present]


def _saved_paths(modules: Sequence[tuple[str, nn.Module]], names: Sequence[str]) -> list[str]:
    """Paths of the modules named, those inside another left out."""
    paths: list[str] = []
    for path, _ in modules:
        if any(_is_named(path, name) for name in names) and not any(_within(path, top) for top in paths):
            paths.append(path)
    return paths


def _attention_internals(modules: Sequence[tuple[str, nn.Module]]) -> dict[str, str]:
    tops = [path for path, module in modules if isinstance(module, nn.MultiheadAttention)]
    reason = "nn.MultiheadAttention reads its weight directly, past any wrapper"
    return {path: reason for path, _ in modules if any(_within(path, top) for top in tops)}


def _heads(model: nn.Module, modules: Sequence[tuple[str, nn.Module]]) -> set[str]:
    """Paths inside the output head of a model."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    output = output.base_layer if isinstance(output, SlotLayer) else output
    tops = [path for path, module in modules if path and (module is output or path in _HEADS)]
    return {path for path, _ in modules if any(_within(path, top) for top in tops)}


def _has_float_weight(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.is_floating_point()


def _linear_names(model: nn.Module) -> list[str]:
    return sorted({path.rpartition(".")[2] for path, module in named_layers(model) if kind_of(module)})
