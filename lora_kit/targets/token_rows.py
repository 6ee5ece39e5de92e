"""Which rows of which embeddings a config trains (`trainable_token_indices`), and which modules share them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from lora_kit.config.lora_config import LoraConfig
from lora_kit.layers.introspect import unwrap_module
from lora_kit.layers.token_embedding import reason_not_token_table, table_size
from lora_kit.targets.match import Modules

_USUAL_EMBEDDING: Final = "embed_tokens"
"""The input embedding of a model that does not say which it is."""
_WRAPPER_SUFFIX: Final = ".token_adapter"
"""What follows a module's path in the name of its wrapper; PEFT's word."""


@dataclass(frozen=True)
class TokenTarget:
    """An embedding, or a head, of which an adapter has rows of its own: (len(indices), features).

    Attributes:
        indices: the rows, in the order in which the adapter has them.
        tied: paths of the other modules that share its weight, and so see the same rows.
    """

    path: str
    indices: tuple[int, ...]
    features: int
    tied: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        return len(self.indices) * self.features

    @property
    def key(self) -> str:
        """What a bank calls the wrapper that holds the rows."""
        return key_of(self.path)

    @property
    def all_paths(self) -> tuple[str, ...]:
        """Paths of all modules that see the rows."""
        return self.path, *self.tied


@dataclass(frozen=True)
class TokenCoverage:
    """The rows that a config trains in a model.

    Attributes:
        problems: what does not fit, in words.
        unmatched: names that no module has.
    """

    targets: tuple[TokenTarget, ...] = ()
    problems: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()


def find_token_coverage(model: Any, modules: Modules, config: LoraConfig) -> TokenCoverage:
    """The rows of embeddings that a config trains in a model.

    Args:
        modules: of the model.
    """
    if config.trainable_token_indices is None:
        return TokenCoverage()
    by_path, embedding = dict(modules), _find_input_embedding(model, modules)
    named, unmatched = _resolve_token_names(config, modules, embedding)
    targets, problems = list[TokenTarget](), list[str]()
    for path, indices in named.items():
        group = _find_sharing_modules(by_path[path], modules)
        first = embedding if embedding in group else group[0]
        if path != first and named.get(first) == indices:
            continue  # the same rows of the same weight, named twice
        others = [other for other in group if other != path]
        told = [f"{place}: {why}" for place in group if (why := reason_not_token_table(by_path[place]))]
        told = told or [f"{path}: {why}" for why in _describe_out_of_range(by_path[path], indices)]
        if path != first or any(named.get(other, indices) != indices for other in others):
            told.append(f"{' and '.join(group)} are one weight, whose rows are trained once: name {first} alone")
        problems += told
        targets.append(TokenTarget(path, indices, table_size(by_path[path])[1] if not told else 0, tuple(others)))
    return TokenCoverage(tuple(targets) if not problems else (), tuple(dict.fromkeys(problems)), tuple(unmatched))


def key_of(path: str) -> str:
    """What a bank calls the wrapper of tokens around the module of this path."""
    return path + _WRAPPER_SUFFIX


def path_of(key: str) -> str:
    """The path of the module that a bank's wrapper stands around, whatever that is for."""
    return key.removesuffix(_WRAPPER_SUFFIX)


def _find_input_embedding(model: Any, modules: Modules) -> str | None:
    """The path of a model's input embedding, where it has one."""
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        found = None
    found = unwrap_module(found) if isinstance(found, nn.Module) else None
    usual = (path for path, _ in modules if path.rpartition(".")[2] == _USUAL_EMBEDDING)
    return next((path for path, module in modules if module is found), next(usual, None))


def _resolve_token_names(
    config: LoraConfig, modules: Modules, embedding: str | None
) -> tuple[Mapping[str, tuple[int, ...]], list[str]]:
    """What a config names: rows by path of their module; and names that no module has."""
    given = config.trainable_token_indices
    if isinstance(given, tuple):
        return ({embedding: given}, []) if embedding is not None else ({}, ["trainable_token_indices"])
    named = {path: indices for path, _ in modules if (indices := config.tokens_of(path))}
    return named, [name for name in given or () if not any(f".{path}".endswith(f".{name}") for path in named)]


def _find_sharing_modules(module: nn.Module, modules: Modules) -> list[str]:
    """Paths of the modules that have the very weight of this one, itself among them."""
    weight = module._parameters.get("weight")
    return [path for path, other in modules if other is module or _has_parameter(other, weight)]


def _has_parameter(module: nn.Module, weight: nn.Parameter | None) -> bool:
    return weight is not None and any(parameter is weight for parameter in module._parameters.values())


def _describe_out_of_range(module: nn.Module, indices: Sequence[int]) -> Iterator[str]:
    """What is said of rows that a module does not have."""
    count = table_size(module)[0]
    beyond = [index for index in indices if index >= count]
    if beyond:
        yield (
            f"it has {count:,} rows, and token {beyond[0]:,} is beyond them; first make room with "
            f"model.resize_token_embeddings({max(beyond) + 1})"
        )
