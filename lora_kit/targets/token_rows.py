"""Find the rows of embeddings that a config trains (`trainable_token_indices`), and the modules that share them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import nn

from lora_kit.config.lora_config import LoraConfig
from lora_kit.layers.introspect import unwrap_module
from lora_kit.layers.token_embedding import reason_not_token_table, table_size
from lora_kit.targets.match import Modules

_USUAL_EMBEDDING: Final = "embed_tokens"
"""Name of the input embedding of a model whose `get_input_embeddings` does not return it."""
_WRAPPER_SUFFIX: Final = ".token_adapter"
"""What follows a module's path in the name of its wrapper, as in PEFT."""


@dataclass(frozen=True)
class TokenTarget:
    """An embedding, or a head, of which an adapter has rows of its own: (len(indices), features).

    Attributes:
        path: of the embedding or head.
        indices: the rows, in the order in which the adapter has them.
        features: values in a row.
        tied: paths of the other modules that share its weight, and so use the same rows.
    """

    path: str
    indices: tuple[int, ...]
    features: int
    tied: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Values in all of the rows."""
        return len(self.indices) * self.features

    @property
    def key(self) -> str:
        """The bank's name of the wrapper that holds the rows."""
        return key_of(self.path)

    @property
    def all_paths(self) -> tuple[str, ...]:
        """Paths of all modules that use the rows."""
        return self.path, *self.tied


@dataclass(frozen=True)
class TokenCoverage:
    """The rows that a config trains in a model.

    Attributes:
        targets: the embeddings and heads with their rows; empty where there are problems.
        problems: mismatches of config and model, one message each.
        unmatched: names in the config that no module has.
    """

    targets: tuple[TokenTarget, ...] = ()
    problems: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()


def find_token_coverage(model: nn.Module, modules: Modules, config: LoraConfig) -> TokenCoverage:
    """Return the rows of embeddings that a config trains in a model.

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
            continue  # the config names the same rows of the same weight twice
        others = [other for other in group if other != path]
        mismatches = [f"{member}: {why}" for member in group if (why := reason_not_token_table(by_path[member]))]
        mismatches = mismatches or list(_find_out_of_range(path, by_path[path], indices))
        if path != first or any(named.get(other, indices) != indices for other in others):
            mismatches.append(f"{' and '.join(group)} share one weight, whose rows are trained once: name only {first}")
        problems += mismatches
        features = 0 if mismatches else table_size(by_path[path])[1]
        targets.append(TokenTarget(path, indices, features, tuple(others)))
    return TokenCoverage(tuple(targets) if not problems else (), tuple(dict.fromkeys(problems)), tuple(unmatched))


def key_of(path: str) -> str:
    """Return the bank's name of the wrapper that holds the trained rows of the module at this path."""
    return path + _WRAPPER_SUFFIX


def path_of(key: str) -> str:
    """Return the path of the module inside a wrapper of a bank; the key itself for wrappers of other kinds."""
    return key.removesuffix(_WRAPPER_SUFFIX)


def find_tied_paths(model: nn.Module, modules: Modules) -> list[str]:
    """Return the paths of the modules that share the weight of a model's input embedding, with its own."""
    embedding = _find_input_embedding(model, modules)
    return [] if embedding is None else _find_sharing_modules(dict(modules)[embedding], modules)


def _find_input_embedding(model: nn.Module, modules: Modules) -> str | None:
    """Return the path of a model's input embedding; None where it has none."""
    try:
        embedding: object = model.get_input_embeddings()  # type: ignore[operator]  # of models of transformers
    except (AttributeError, NotImplementedError):
        embedding = None
    embedding = unwrap_module(embedding) if isinstance(embedding, nn.Module) else None
    usual = (path for path, _ in modules if path.rpartition(".")[2] == _USUAL_EMBEDDING)
    return next((path for path, module in modules if module is embedding), next(usual, None))


def _resolve_token_names(
    config: LoraConfig, modules: Modules, embedding: str | None
) -> tuple[Mapping[str, tuple[int, ...]], list[str]]:
    """Return the rows that a config names, by the path of their module; and the names that no module has."""
    tokens = config.trainable_token_indices
    if isinstance(tokens, tuple):
        return ({embedding: tokens}, []) if embedding is not None else ({}, ["trainable_token_indices"])
    named = {path: indices for path, _ in modules if (indices := config.tokens_of(path))}
    return named, [name for name in tokens or () if not any(f".{path}".endswith(f".{name}") for path in named)]


def _find_sharing_modules(module: nn.Module, modules: Modules) -> list[str]:
    """Return the paths of the modules that share the weight of this one, with its own."""
    weight = module._parameters.get("weight")
    return [path for path, other in modules if other is module or _has_parameter(other, weight)]


def _has_parameter(module: nn.Module, weight: nn.Parameter | None) -> bool:
    return weight is not None and any(parameter is weight for parameter in module._parameters.values())


def _find_out_of_range(path: str, module: nn.Module, indices: Sequence[int]) -> Iterator[str]:
    """Yield a message where a module has fewer rows than the indices need."""
    count = table_size(module)[0]
    beyond = [index for index in indices if index >= count]
    if beyond:
        yield (
            f"{path}: it has {count:,} rows, so token {beyond[0]:,} is out of range; first add rows with "
            f"model.resize_token_embeddings({max(beyond) + 1})"
        )
