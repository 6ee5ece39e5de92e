"""Find the modules of a model that the names, expressions and layer numbers of a config select."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Final

from torch import nn

from lora_kit.config.lora_config import ALL_LINEAR, LoraConfig
from lora_kit.config.module_patterns import NamedEnds, compile_expression, make_ending_matcher
from lora_kit.layers.introspect import kind_of, unwrap_module, unwrap_outer

Modules = Sequence[tuple[str, nn.Module]]
"""(path, module) of the modules of a base."""

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
"""Names of the routers of a mixture of experts. `all-linear` leaves them out, and the modules inside them."""
_EXPERTS: Final = "experts"


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of a base, outer modules first.

    A wrapper of a bank appears as the module inside it, and so does what others put around a module
    (`lora_kit.layers.introspect.WRAPPER_NAMES`).
    """
    seen: set[nn.Module] = set()
    pending: list[tuple[str, nn.Module]] = [("", model)]
    while pending:
        path, module = pending.pop()
        if module._modules:
            module = unwrap_module(unwrap_outer(module))
        if module not in seen:
            seen.add(module)
            yield path, module
            prefix = f"{path}." if path else ""
            children = reversed(module._modules.items())
            pending += [(prefix + name, child) for name, child in children if child is not None]


def target_names_of(config: LoraConfig) -> tuple[str, ...]:
    """Return the names in `target_modules`; none where it is an expression or `all-linear`."""
    return config.target_modules if isinstance(config.target_modules, tuple) else ()


def is_within(path: str, top: str) -> bool:
    """Return whether a path is that of the module at `top`, or of a module inside it."""
    return path == top or path.startswith(top + ".")


def find_paths_inside(modules: Modules, tops: Sequence[str]) -> set[str]:
    """Return the paths of the modules at `tops` and of everything inside them."""
    return {path for path, _ in modules if any(is_within(path, top) for top in tops)} if tops else set()


def make_matcher(patterns: str | Sequence[str] | None) -> Callable[[str], bool]:
    """Return a test of paths: against one regular expression, or against the ends of paths that are names."""
    if isinstance(patterns, str):
        return compile_expression(patterns).matches
    if not patterns:
        return lambda path: False
    names = NamedEnds(patterns)
    return lambda path: bool(names.find(path))


def select_modules(model: nn.Module, modules: Modules, config: LoraConfig) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that a config names, whether or not they can have LoRA weights."""
    all_linear = config.target_modules == ALL_LINEAR
    is_expression = isinstance(config.target_modules, str) and not all_linear
    left_out = _find_heads(model, modules) | _find_routers(modules) if all_linear else set()
    is_target = make_matcher(None if all_linear else config.target_modules)
    is_excluded = make_matcher(config.exclude_modules)
    names = frozenset(target_names_of(config))
    for path, module in modules:
        selected = kind_of(module) == "linear" and path not in left_out if all_linear else is_target(path)
        # `layers_to_transform` does not narrow an expression or a whole path: these say which layer they mean.
        in_layers = is_expression or path in names or _is_in_selected_layer(path, config)
        if path and selected and not is_excluded(path) and in_layers:
            yield path, module


def _find_layer_index(path: str, patterns: Sequence[str] | None) -> int | None:
    """Return the index of a module's layer: the first number after one of `patterns`, or after any name."""
    match = re.match(r".*?\.[^.]*\.(\d+)\.", path) if not patterns else None
    for pattern in patterns or ():
        match = match or re.match(rf"(?:^|.*?\.){re.escape(pattern)}\.(\d+)\.", path)
    return int(match.group(1)) if match else None


def _is_in_selected_layer(path: str, config: LoraConfig) -> bool:
    """Return whether a module is in one of `layers_to_transform`; always where these are not given."""
    if config.layers_to_transform is None:
        return True
    return _find_layer_index(path, config.layers_pattern) in config.layers_to_transform


def find_missing_indices(config: LoraConfig, paths: Iterable[str]) -> list[str]:
    """Return the entries of `layers_to_transform` in which no covered path is."""
    if config.layers_to_transform is None:
        return []
    present = {_find_layer_index(path, config.layers_pattern) for path in paths}
    return [f"layers_to_transform={index}" for index in config.layers_to_transform if index not in present]


def find_saved_paths(modules: Modules, names: Sequence[str]) -> list[str]:
    """Return the paths of the modules that `modules_to_save` selects, without those inside another of them.

    As in PEFT, a name selects every module whose path ends in it, with or without a dot before it: `classifier` selects
    `pre_classifier` as well.
    """
    is_selected = make_ending_matcher(names)
    return _outermost(path for path, _ in modules if is_selected(path)) if names else []


def find_saved_paths_of_file(modules: Modules, names: Sequence[str], keys: Collection[str]) -> list[str]:
    """Return the paths of the modules that `modules_to_save` selected when an adapter was written.

    These are PEFT's, unless the file has nothing of those whose names do not match as a whole: adapters that were made
    here before PEFT's rule was followed have only the modules of these very names.

    Args:
        keys: of the file's saved tensors (`classifier.weight`).
    """
    if not names:
        return []
    paths, is_named = find_saved_paths(modules, names), make_matcher(names)
    matched_by_ending = [f"{path}." for path in paths if not is_named(path)]
    if any(key.startswith(tuple(matched_by_ending)) for key in keys):
        return paths
    return _outermost(path for path, _ in modules if is_named(path))


def name_saved_modules(modules: Modules, names: Sequence[str], paths: Sequence[str]) -> tuple[str, ...]:
    """Return names from which PEFT selects exactly the modules of these paths: `names`, or else whole paths."""
    is_selected = make_ending_matcher(names)
    selected = [path for path, _ in modules if is_selected(path)]
    return tuple(names) if selected == list(paths) else tuple(paths)


def _outermost(paths: Iterable[str]) -> list[str]:
    """Return paths without those inside another of them, which comes first."""
    tops = list[str]()
    for path in paths:
        if not any(is_within(path, top) for top in tops):
            tops.append(path)
    return tops


def _find_heads(model: nn.Module, modules: Modules) -> set[str]:
    """Return the paths of the output head of a model and of everything inside it."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    output = None if output is None else unwrap_module(output)
    return find_paths_inside(
        modules, [path for path, module in modules if path and (module is output or path in HEAD_NAMES)]
    )


def _find_routers(modules: Modules) -> set[str]:
    """Return the paths of routers, which are siblings of their experts, and of everything inside them."""
    mixtures = {path.rpartition(".")[0] for path, _ in modules if path.rpartition(".")[2] == _EXPERTS}
    split = ((path, *path.rpartition(".")) for path, _ in modules)
    return find_paths_inside(
        modules, [path for path, parent, _, name in split if name in _ROUTER_NAMES and parent in mixtures]
    )


def is_in_expert(path: str) -> bool:
    """Return whether a module belongs to one expert of a mixture, so that its input is routed tokens, not a batch."""
    return _EXPERTS in path.split(".")[:-1]
