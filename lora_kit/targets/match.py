"""Which modules of a model the names, expressions and layer numbers of a config select."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from torch import nn

from lora_kit.config.lora_config import ALL_LINEAR, LoraConfig
from lora_kit.config.module_patterns import compile_expression, suffixes_of
from lora_kit.layers.introspect import kind_of, unwrap_module

Modules = Sequence[tuple[str, nn.Module]]
"""Modules of a base with their paths."""

HEAD_NAMES: Final = (
    "score",
    "classifier",
    "classification_head",
    "pre_classifier",
    "head",
    "pooler",
    "sequence_summary",
    "logits_proj",
    "qa_outputs",
    "lm_head",
)
"""Names of modules directly under transformers' models that belong to the output head; `all-linear` skips them."""
_ROUTER_NAMES: Final = frozenset({"gate", "router", "shared_expert_gate"})
"""Names of what chooses between the experts of a mixture; `all-linear` leaves them alone, and what is in them."""
_EXPERTS: Final = "experts"
_READ_BY_KERNELS: Final = ("x_proj", "dt_proj", "out_proj")
"""Linear layers of a state-space mixer (Mamba and its kin) whose weight it reads itself, always or on a GPU."""


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the base model: wrappers are seen as what they wrap, and what they add is not shown."""
    seen: set[nn.Module] = set()
    ahead: list[tuple[str, nn.Module]] = [("", model)]
    while ahead:
        path, module = ahead.pop()
        module = unwrap_module(module)
        if module not in seen:
            seen.add(module)
            yield path, module
            start = f"{path}." if path else ""
            ahead += [(start + name, child) for name, child in reversed(module._modules.items()) if child is not None]


def target_names_of(config: LoraConfig) -> tuple[str, ...]:
    return config.target_modules if isinstance(config.target_modules, tuple) else ()


def is_within(path: str, top: str) -> bool:
    return path == top or path.startswith(top + ".")


def find_paths_inside(modules: Modules, tops: Sequence[str]) -> set[str]:
    """Paths of these modules and of everything in them."""
    return {path for path, _ in modules if any(is_within(path, top) for top in tops)} if tops else set()


def make_matcher(patterns: str | Sequence[str] | None) -> Callable[[str], bool]:
    """Whether a path is matched by one regular expression, or by one of these names."""
    if isinstance(patterns, str):
        return compile_expression(patterns).matches
    names = frozenset(patterns or ())
    return lambda path: not names.isdisjoint(suffixes_of(path))


def select_modules(model: nn.Module, modules: Modules, config: LoraConfig) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a config names, whether or not they can carry a pair."""
    everything, by_expression = config.target_modules == ALL_LINEAR, isinstance(config.target_modules, str)
    left_alone = _find_heads(model, modules) | _find_routers(modules) if everything else set()
    covered, excluded = (
        make_matcher(None if everything else config.target_modules),
        make_matcher(config.exclude_modules),
    )
    whole = frozenset(target_names_of(config))
    for path, module in modules:
        found = kind_of(module) == "linear" and path not in left_alone if everything else covered(path)
        # An expression and a whole path say which layer they mean.
        chosen = (by_expression and not everything) or path in whole
        if path and found and not excluded(path) and (chosen or _is_layer_selected(path, config)):
            yield path, module


def _find_layer_index(path: str, patterns: Sequence[str] | None) -> int | None:
    """The number of the layer a module belongs to: the first number after a list of that name, or after any name."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", path) if not patterns else None
    for pattern in patterns or ():
        found = found or re.match(rf"(?:^|.*?\.){re.escape(pattern)}\.(\d+)\.", path)
    return int(found.group(1)) if found else None


def _is_layer_selected(path: str, config: LoraConfig) -> bool:
    if config.layers_to_transform is None:
        return True
    return _find_layer_index(path, config.layers_pattern) in config.layers_to_transform


def find_missing_indices(config: LoraConfig, paths: Iterable[str]) -> list[str]:
    """Entries of `layers_to_transform` that no covered path is in."""
    if config.layers_to_transform is None:
        return []
    present = {_find_layer_index(path, config.layers_pattern) for path in paths}
    return [f"layers_to_transform={index}" for index in config.layers_to_transform if index not in present]


def find_saved_paths(modules: Modules, names: Sequence[str]) -> list[str]:
    """Paths of the modules named, those inside another left out."""
    named, paths = make_matcher(names), list[str]()
    for path, _ in modules:
        if named(path) and not any(is_within(path, top) for top in paths):
            paths.append(path)
    return paths


def find_attention_internals(modules: Modules) -> dict[str, str]:
    tops = [path for path, module in modules if isinstance(module, nn.MultiheadAttention)]
    return dict.fromkeys(
        find_paths_inside(modules, tops), "nn.MultiheadAttention reads its weight directly, past any wrapper"
    )


def find_mixer_internals(modules: Modules) -> dict[str, str]:
    mixers = {path for path, module in modules if {"A_log", "D"} <= module._parameters.keys()}
    read = {f"{mixer}.{name}" for mixer in mixers for name in _READ_BY_KERNELS}
    paths = [path for path, _ in modules if path in read]
    return dict.fromkeys(paths, "a state-space mixer reads its weight directly, past any wrapper")


def _find_heads(model: nn.Module, modules: Modules) -> set[str]:
    """Paths inside the output head of a model."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    output = None if output is None else unwrap_module(output)
    return find_paths_inside(
        modules, [path for path, module in modules if path and (module is output or path in HEAD_NAMES)]
    )


def _find_routers(modules: Modules) -> set[str]:
    """Paths of the routers of mixtures, which stand beside their experts, and of everything in them."""
    mixtures = {path.rpartition(".")[0] for path, _ in modules if path.rpartition(".")[2] == _EXPERTS}
    split = ((path, *path.rpartition(".")) for path, _ in modules)
    return find_paths_inside(
        modules, [path for path, parent, _, name in split if name in _ROUTER_NAMES and parent in mixtures]
    )


def is_in_expert(path: str) -> bool:
    """Whether a module belongs to one expert of a mixture, and so is given the tokens sent there, not a batch."""
    return _EXPERTS in path.split(".")[:-1]
