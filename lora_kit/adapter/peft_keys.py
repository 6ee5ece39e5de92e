"""From the keys of PEFT's weight files to what they stand for: pairs, modules saved whole, every misfit in words."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import AdapterError, format_list
from lora_kit.io.safetensors import DTYPES
from lora_kit.io.text import escape_text

PREFIX: Final = "base_model.model."
"""Before every key of PEFT's weight files."""

_MARK: Final = ".lora_"
_KEY_ENDINGS: Final = {
    "A.weight": ("linear", "A"),
    "B.weight": ("linear", "B"),
    "embedding_A": ("embedding", "A"),
    "embedding_B": ("embedding", "B"),
    "magnitude_vector": ("linear", "magnitude"),
}
"""What follows the mark: the kind of layer, and what of its pair the tensor is."""
_NESTED_SUFFIX: Final = ".base_layer"
"""PEFT's wrappers of several parameters of one module are nested."""
_TOKENS_SUFFIX: Final = ".token_adapter.trainable_tokens_delta"
"""PEFT's name for the rows of new tokens, which are the rows themselves and no difference to others."""
_COPY_SUFFIX: Final = ".base_layer.weight"
"""PEFT writes the frozen table of an adapted embedding beside its pair, under this suffix."""
_READABLE_DTYPES: Final = frozenset(DTYPES.values())
_NAME_LIMIT: Final = 1_000
_MAX_MISMATCHES_SHOWN: Final = 200
_SMALL_TENSOR: Final = 4_096
"""Elements up to which calling an operation costs more than what it does."""


@dataclass(frozen=True)
class LoraWeights:
    """The update of one layer, `B A` before scaling.

    Attributes:
        a: (r, in); for an embedding (r, entries).
        b: (out, r); for an embedding (dim, r).
        kind: `linear`, `embedding`, or `parameter`: then A is (E·r, in) and B (out, r·E) for E experts, and the path is
            that of the module, with `.base_layer` once for each of its later parameters that has a pair too. Or
            `convolution`: A (r, in, k...) and B (out, r, 1...).
        magnitude: (out,), of a DoRA only.
    """

    a: Tensor
    b: Tensor
    kind: str
    magnitude: Tensor | None = None

    def split_by_expert(self, rank: int) -> list[tuple[Tensor, Tensor]]:
        """A (r, in) and B (out, r) of each expert of a parameter; of any other layer its two as matrices."""
        if self.kind != "parameter":
            return [(self.a.flatten(1), self.b.flatten(1))]
        count = self.a.shape[0] // rank
        each_a, each_b = self.a.reshape(count, rank, -1), self.b.reshape(-1, rank, count).permute(2, 0, 1)
        return list(zip(each_a, each_b, strict=True))


@dataclass(frozen=True)
class TokenEmbeddings:
    """Rows of an embedding, or of a head, that an adapter has in place of the base's.

    Attributes:
        indices: the tokens, one per row. rows: (k, dim).
    """

    indices: tuple[int, ...]
    rows: Tensor


def token_embeddings_key(path: str) -> str:
    """The key of the rows of new tokens in PEFT's weight file, of the embedding of this path."""
    return f"{PREFIX}{path}{_TOKENS_SUFFIX}"


def magnitude_key(path: str) -> str:
    """The key of a DoRA's magnitude in PEFT's weight file for the layer of this path."""
    return f"{PREFIX}{path}{_MARK}magnitude_vector"


def lora_weight_keys(path: str, kind: str) -> tuple[str, str]:
    """The keys of A and B in PEFT's weight file for the layer of this path."""
    if kind == "embedding":
        return f"{PREFIX}{path}{_MARK}embedding_A", f"{PREFIX}{path}{_MARK}embedding_B"
    return f"{PREFIX}{path}{_MARK}A.weight", f"{PREFIX}{path}{_MARK}B.weight"


@dataclass
class AdapterTensors:
    """An adapter's tensors by what they are for, each by path of its module.

    Attributes:
        pairs: by path of their layer.
        saved: tensors of modules saved whole (`model.score.weight`).
        tokens: rows of embeddings, by path of the embedding.
        copies: weights of the base, by path of the layer.
        misfits: what does not fit the config, in words.
    """

    pairs: dict[str, LoraWeights] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, TokenEmbeddings] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    misfits: list[str] = field(default_factory=list)


def classify_tensors(config: LoraConfig, tensors: Mapping[str, Tensor], allow: Collection[str]) -> AdapterTensors:
    """The tensors of an adapter, sorted.

    Raises:
        AdapterError: listing every tensor that does not fit the config.
    """
    found = AdapterTensors(misfits=list(_find_invalid_values(tensors)))
    parts = _classify_keys(config, tensors, allow, found)
    for (path, kind), sides in parts.items():
        if "A" in sides and sides["A"].ndim > 2:
            kind = "convolution"
        elif _is_parameter_path(path, config):
            kind = "parameter"
        wrong = _find_weight_mismatches(path, sides, config)
        if path in found.pairs:
            wrong.append(f"{path}: pairs for a linear layer and for an embedding")
        found.misfits += wrong
        if not wrong:
            found.pairs[path] = LoraWeights(sides["A"], sides["B"], kind, sides.get("magnitude"))
    found.misfits += [*_find_missing_modules(config, found.saved), *_find_token_mismatches(config, found.tokens)]
    if not tensors:
        found.misfits.append("the file holds no tensors")
    elif (config.target_modules or config.target_parameters) and not parts:
        found.misfits.append("the config has target_modules, but the file holds no pair")
    if found.misfits:
        told = found.misfits[:_MAX_MISMATCHES_SHOWN]
        if len(found.misfits) > len(told):
            told.append(f"and {len(found.misfits) - len(told):,} more")
        hint = "`lora-kit convert` knows the names of other tools" if not found.pairs and tensors else ""
        raise AdapterError("the tensors do not fit the config:\n  " + "\n  ".join(told), hint=hint)
    return found


def _classify_keys(
    config: LoraConfig, tensors: Mapping[str, Tensor], allow: Collection[str], found: AdapterTensors
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Put saved modules and copies where they belong; returns the parts of pairs by (path, kind)."""
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        bare = key.removeprefix(PREFIX)
        path, _, end = bare.rpartition(_MARK)
        ours = bare != key
        if not key.isprintable() or len(key) > _NAME_LIMIT:
            found.misfits.append(f"{escape_text(key)} is not the name of a tensor")
        elif ours and path and end in _KEY_ENDINGS:
            kind, part = _KEY_ENDINGS[end]
            parts.setdefault((path, kind), {})[part] = tensor
        elif ours and bare.endswith(_TOKENS_SUFFIX):
            path = bare.removesuffix(_TOKENS_SUFFIX)
            found.tokens[path] = TokenEmbeddings(config.tokens_of(path), tensor)
        elif ours and _is_within(bare, config.modules_to_save):
            found.saved[bare] = tensor
        elif ours and bare.endswith(_COPY_SUFFIX):
            found.copies[bare.removesuffix(_COPY_SUFFIX)] = tensor
        elif "extra-keys" not in allow:
            expected = "neither a pair nor in modules_to_save" if ours else f"keys begin with {PREFIX}"
            found.misfits.append(f"{key} is not expected: {expected}")
    return parts


def _find_invalid_values(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What the values are that may not be: none but finite numbers, floating ones where they are weights."""
    numbers: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if tensor.dtype not in _READABLE_DTYPES or not tensor.is_cpu:
            yield f"{escape_text(key)} is {tensor.dtype} on {tensor.device}; plain numbers on the CPU are expected"
        elif tensor.is_floating_point():
            numbers[key] = tensor
        elif _MARK in key or key.endswith((".weight", ".bias", _TOKENS_SUFFIX)):
            yield f"{escape_text(key)} has dtype {tensor.dtype}; a floating dtype is expected"
    few: dict[torch.dtype, list[str]] = {}
    for key, tensor in numbers.items():
        if tensor.numel() <= _SMALL_TENSOR:
            few.setdefault(tensor.dtype, []).append(key)
        elif not _is_finite(tensor):
            yield f"{escape_text(key)} holds NaN or infinity"
    for keys in few.values():
        # Small ones together, since every call has its price; one by one only to say which it is.
        if not _is_finite(torch.cat([numbers[key].reshape(-1) for key in keys])):
            yield from (f"{escape_text(key)} holds NaN or infinity" for key in keys if not _is_finite(numbers[key]))


def _is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite, in fp32 too."""
    tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
    # NaN and infinity always show in a sum, which takes one pass and no memory; a sum that overflows says nothing.
    total = tensor.sum(dtype=torch.float32)
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


def _find_weight_mismatches(path: str, sides: Mapping[str, Tensor], config: LoraConfig) -> list[str]:
    a, b, magnitude = sides.get("A"), sides.get("B"), sides.get("magnitude")
    told = [f"{path}: lora_{side} is missing" for side in "AB" if side not in sides]
    if a is not None and b is not None:
        told += _find_shape_mismatches(path, a.shape, b.shape, config)
    if config.use_dora != (magnitude is not None):
        there = "missing" if magnitude is None else "there"
        told.append(f"{path}: use_dora is {config.use_dora}, and a magnitude is {there}")
    elif magnitude is not None and b is not None and magnitude.shape != b.shape[:1]:
        told.append(f"{path}: the magnitude is {tuple(magnitude.shape)}, {tuple(b.shape[:1])} is expected")
    return told


def _find_shape_mismatches(path: str, a: Sequence[int], b: Sequence[int], config: LoraConfig) -> list[str]:
    if not 2 <= len(a) == len(b) <= 4 or set(b[2:]) - {1}:
        return [f"{path}: A {tuple(a)} and B {tuple(b)} are not matrices"]
    rank = config.rank_of(path)
    if a[0] == b[1] == rank or (_is_parameter_path(path, config) and a[0] == b[1] and a[0] % rank == 0):
        return []
    hint = "; A looks transposed" if a[1] == rank and a[0] != rank else ""
    return [f"{path}: the config says rank {rank}, the tensors are A {tuple(a)} and B {tuple(b)}{hint}"]


def _is_parameter_path(path: str, config: LoraConfig) -> bool:
    """Whether the pair at a path is that of one of the parameters that a config targets."""
    module = path.replace(_NESTED_SUFFIX, "")
    owners = (name.rpartition(".")[0] for name in config.target_parameters)
    return any(module == owner or module.endswith("." + owner) for owner in owners)


def _find_token_mismatches(config: LoraConfig, tokens: Mapping[str, TokenEmbeddings]) -> Iterator[str]:
    given = config.trainable_token_indices
    if given is not None and not tokens:
        yield "the config has trainable_token_indices, but the file holds no rows of them"
    if isinstance(given, tuple) and len(tokens) > 1:
        names = format_list(sorted(tokens))
        yield f"trainable_token_indices is a list for one embedding; the file holds rows of {names}"
    for path, held in tokens.items():
        if not held.indices:
            yield f"{path}: rows of tokens, of which the config's trainable_token_indices says nothing"
        elif held.rows.ndim != 2 or len(held.rows) != len(held.indices):
            yield f"{path}: rows {tuple(held.rows.shape)} for {len(held.indices)} tokens of trainable_token_indices"


def _is_within(key: str, modules: Sequence[str]) -> bool:
    """Whether a key (`model.score.weight`) lies in one of the modules of these names."""
    return any(f".{name}." in f".{key}" for name in modules)


def _find_missing_modules(config: LoraConfig, saved: Mapping[str, Tensor]) -> list[str]:
    names = [name for name in config.modules_to_save if not any(_is_within(key, [name]) for key in saved)]
    return [f"modules_to_save names {name}, of which the file holds nothing" for name in names]
