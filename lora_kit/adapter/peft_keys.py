"""Classify the tensors of PEFT's weight files by key, and list every mismatch with the config."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from lora_kit.config.lora_config import LoraConfig
from lora_kit.config.module_patterns import make_ending_matcher
from lora_kit.config.peft_fields import HEADS_SAVED_BY_TASK
from lora_kit.errors import AdapterError, format_list
from lora_kit.io.safetensors import DTYPES
from lora_kit.io.text import escape_text

logger = logging.getLogger(__name__)

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
"""What follows the mark: the kind of layer, and which of its LoRA weights the tensor is."""
_NESTED_SUFFIX: Final = ".base_layer"
"""In keys of a second parameter of a module: PEFT nests the wrappers of several parameters."""
_TOKENS_SUFFIX: Final = ".token_adapter.trainable_tokens_delta"
"""PEFT's name for token embeddings. Despite it they are the rows themselves, not differences."""
_COPY_SUFFIX: Final = ".base_layer.weight"
"""PEFT writes the frozen weight of an adapted embedding beside its LoRA weights, under this suffix."""
_READABLE_DTYPES: Final = frozenset(DTYPES.values())
_NAME_LIMIT: Final = 1_000
_MAX_MISMATCHES_SHOWN: Final = 200
_SMALL_TENSOR: Final = 4_096
"""Elements up to which calling an operation costs more than its work."""


@dataclass(frozen=True)
class LoraWeights:
    """The update of one layer, `B A` before scaling.

    Attributes:
        a: (r, in); for an embedding (r, entries).
        b: (out, r); for an embedding (dim, r).
        kind: `linear`, `embedding`, `convolution` (A (r, in, k...) and B (out, r, 1...)), or `parameter`: then A is
            (E·r, in) and B (out, r·E) for E experts, and the path is that of the module, with `.base_layer` once for
            each of its later parameters that has LoRA weights too.
        magnitude: (out,), of a DoRA; None of any other adapter.
    """

    a: Tensor
    b: Tensor
    kind: str
    magnitude: Tensor | None = None

    def split_by_expert(self, rank: int) -> list[tuple[Tensor, Tensor]]:
        """Return A (r, in) and B (out, r) of each expert of a parameter; of any other layer its own, as matrices."""
        if self.kind != "parameter":
            return [(self.a.flatten(1), self.b.flatten(1))]
        count = self.a.shape[0] // rank
        each_a, each_b = self.a.reshape(count, rank, -1), self.b.reshape(-1, rank, count).permute(2, 0, 1)
        return list(zip(each_a, each_b, strict=True))


@dataclass(frozen=True)
class TokenEmbeddings:
    """Rows of an embedding or a head that an adapter has in place of the base's.

    Attributes:
        indices: the tokens, one per row.
        rows: (k, dim).
    """

    indices: tuple[int, ...]
    rows: Tensor


def token_embeddings_key(path: str) -> str:
    """Return the key of the token embeddings in PEFT's weight file, for the embedding of this path."""
    return f"{PREFIX}{path}{_TOKENS_SUFFIX}"


def magnitude_key(path: str) -> str:
    """Return the key of a DoRA's magnitude in PEFT's weight file for the layer of this path."""
    return f"{PREFIX}{path}{_MARK}magnitude_vector"


def lora_weight_keys(path: str, kind: str) -> tuple[str, str]:
    """Return the keys of A and B in PEFT's weight file for the layer of this path."""
    if kind == "embedding":
        return f"{PREFIX}{path}{_MARK}embedding_A", f"{PREFIX}{path}{_MARK}embedding_B"
    return f"{PREFIX}{path}{_MARK}A.weight", f"{PREFIX}{path}{_MARK}B.weight"


@dataclass
class AdapterTensors:
    """An adapter's tensors by their purpose.

    Attributes:
        pairs: LoRA weights, by path of their layer.
        saved: tensors of `modules_to_save`, by path (`model.score.weight`).
        tokens: token embeddings, by path of the embedding or head.
        copies: weights of the base, by path of the layer.
        mismatches: what does not match the config, in words.
    """

    pairs: dict[str, LoraWeights] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, TokenEmbeddings] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    mismatches: list[str] = field(default_factory=list)


def name_saved_heads(config: LoraConfig, tensors: Iterable[str]) -> LoraConfig:
    """Return a config whose `modules_to_save` names the heads that PEFT saved because of the task.

    Older versions of PEFT write `modules_to_save: null` then.

    Args:
        tensors: keys of the adapter's file.
    """
    names = [name for name in HEADS_SAVED_BY_TASK.get(config.task_type or "", ()) if name not in config.modules_to_save]
    saved = [key for key in tensors if names and _MARK not in key]
    present = [name for name in names if any(_is_within(key, make_ending_matcher([name])) for key in saved)]
    return dataclasses.replace(config, modules_to_save=(*config.modules_to_save, *present)) if present else config


def classify_tensors(config: LoraConfig, tensors: Mapping[str, Tensor], allow: Collection[str]) -> AdapterTensors:
    """Classify the tensors of an adapter by their purpose.

    Raises:
        AdapterError: listing every tensor that does not match the config.
    """
    result = AdapterTensors(mismatches=list(_find_invalid_values(tensors)))
    weights = _classify_keys(config, tensors, allow, result)
    for (path, kind), sides in weights.items():
        if "A" in sides and sides["A"].ndim > 2:
            kind = "convolution"
        elif _is_parameter_path(path, config):
            kind = "parameter"
        mismatches = _find_weight_mismatches(path, sides, config)
        if path in result.pairs:
            mismatches.append(f"{path}: LoRA weights for a linear layer and for an embedding")
        result.mismatches += mismatches
        if not mismatches:
            result.pairs[path] = LoraWeights(sides["A"], sides["B"], kind, sides.get("magnitude"))
    result.mismatches += _find_token_mismatches(config, result.tokens)
    if not tensors:
        result.mismatches.append("the file holds no tensors")
    elif (config.target_modules or config.target_parameters) and not weights:
        result.mismatches.append("the config has target_modules, but the file holds no LoRA weights")
    if result.mismatches:
        hint = "`lora-kit convert` reads what other tools wrote" if tensors and not result.pairs else ""
        raise _mismatch_error(result.mismatches, hint)
    return result


def _mismatch_error(mismatches: Sequence[str], hint: str) -> AdapterError:
    lines = ["the tensors do not fit the config:", *mismatches[:_MAX_MISMATCHES_SHOWN]]
    if len(mismatches) > _MAX_MISMATCHES_SHOWN:
        lines.append(f"and {len(mismatches) - _MAX_MISMATCHES_SHOWN:,} more")
    return AdapterError("\n  ".join(lines), hint=hint)


def _classify_keys(
    config: LoraConfig, tensors: Mapping[str, Tensor], allow: Collection[str], result: AdapterTensors
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Add all but LoRA weights to a result; return those by (path, kind), then by `A`, `B` and `magnitude`."""
    weights: dict[tuple[str, str], dict[str, Tensor]] = {}
    is_saved, ignored = make_ending_matcher(config.modules_to_save), list[str]()
    for key, tensor in tensors.items():
        bare = key.removeprefix(PREFIX)
        path, _, ending = bare.rpartition(_MARK)
        has_prefix = bare != key
        if not key.isprintable() or len(key) > _NAME_LIMIT:
            result.mismatches.append(f"{escape_text(key)} is not the name of a tensor")
        elif has_prefix and path and ending in _KEY_ENDINGS:
            kind, side = _KEY_ENDINGS[ending]
            weights.setdefault((path, kind), {})[side] = tensor
        elif has_prefix and bare.endswith(_TOKENS_SUFFIX):
            path = bare.removesuffix(_TOKENS_SUFFIX)
            result.tokens[path] = TokenEmbeddings(config.tokens_of(path), tensor)
        elif has_prefix and _is_within(bare, is_saved):
            result.saved[bare] = tensor
        elif has_prefix and bare.endswith(_COPY_SUFFIX):
            result.copies[bare.removesuffix(_COPY_SUFFIX)] = tensor
        elif has_prefix and config.ties_weights:  # which module is tied to the embedding, only the model says
            result.saved[bare] = tensor
        elif "extra-keys" in allow:
            ignored.append(key)
        else:
            expected = "neither LoRA weights nor in modules_to_save" if has_prefix else f"keys begin with {PREFIX}"
            result.mismatches.append(f"{key} is not expected: {expected}")
    if ignored:
        logger.warning("these tensors are ignored, since the config does not mention them: %s", ", ".join(ignored))
    return weights


def _find_invalid_values(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield, in words, each tensor of a dtype that is not supported, or with a value that is not finite."""
    floating: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if tensor.dtype not in _READABLE_DTYPES or not tensor.is_cpu:
            yield f"{escape_text(key)} is {tensor.dtype} on {tensor.device}; plain numbers on the CPU are expected"
        elif tensor.is_floating_point():
            floating[key] = tensor
        elif _MARK in key or key.endswith((".weight", ".bias", _TOKENS_SUFFIX)):
            yield f"{escape_text(key)} has dtype {tensor.dtype}; a floating dtype is expected"
    small: dict[torch.dtype, list[str]] = {}
    for key, tensor in floating.items():
        if tensor.numel() <= _SMALL_TENSOR:
            small.setdefault(tensor.dtype, []).append(key)
        elif not _is_finite(tensor):
            yield f"{escape_text(key)} holds NaN or infinity"
    for keys in small.values():
        # Small ones together, since every call has its price; one by one only to say which it is.
        if not _is_finite(_join_values([floating[key] for key in keys])):
            yield from (f"{escape_text(key)} holds NaN or infinity" for key in keys if not _is_finite(floating[key]))


def _join_values(tensors: Sequence[Tensor]) -> Tensor:
    """Return the values of tensors of one dtype as one tensor: their memory itself, where they share it as a file's do.

    Nothing is missing then; a value more, where some overlap, only makes the caller look at each by itself.
    """
    memory = tensors[0].untyped_storage()
    begin, size = memory.data_ptr(), sum(tensor.nbytes for tensor in tensors)
    if size == memory.nbytes() and all(tensor.untyped_storage().data_ptr() == begin for tensor in tensors):
        return torch.empty(0, dtype=tensors[0].dtype).set_(memory)
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _is_finite(tensor: Tensor) -> bool:
    """Return whether every value is finite, in fp32 too."""
    tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
    # NaN and infinity always show in a sum, which takes one pass and no memory; a sum that overflows says nothing.
    total = tensor.sum(dtype=torch.float32)
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


def _find_weight_mismatches(path: str, sides: Mapping[str, Tensor], config: LoraConfig) -> list[str]:
    a, b, magnitude = sides.get("A"), sides.get("B"), sides.get("magnitude")
    mismatches = [f"{path}: lora_{side} is missing" for side in "AB" if side not in sides]
    if a is not None and b is not None:
        mismatches += _find_shape_mismatches(path, a.shape, b.shape, config)
    if config.use_dora != (magnitude is not None):
        state = "missing" if magnitude is None else "there"
        mismatches.append(f"{path}: use_dora is {config.use_dora}, and a magnitude is {state}")
    elif magnitude is not None and b is not None and magnitude.shape != b.shape[:1]:
        mismatches.append(f"{path}: the magnitude is {tuple(magnitude.shape)}, {tuple(b.shape[:1])} is expected")
    return mismatches


def _find_shape_mismatches(path: str, a: Sequence[int], b: Sequence[int], config: LoraConfig) -> list[str]:
    if not 2 <= len(a) == len(b) <= 4 or set(b[2:]) - {1}:
        return [f"{path}: A {tuple(a)} and B {tuple(b)} are not matrices"]
    rank = config.rank_of(path)
    if a[0] == b[1] == rank or (_is_parameter_path(path, config) and a[0] == b[1] and a[0] % rank == 0):
        return []
    hint = "; A looks transposed" if a[1] == rank and a[0] != rank else ""
    return [f"{path}: the config says rank {rank}, the tensors are A {tuple(a)} and B {tuple(b)}{hint}"]


def _is_parameter_path(path: str, config: LoraConfig) -> bool:
    """Return whether the LoRA weights at a path are those of a parameter that a config targets."""
    module = path.replace(_NESTED_SUFFIX, "")
    owners = (name.rpartition(".")[0] for name in config.target_parameters)
    return any(module == owner or module.endswith("." + owner) for owner in owners)


def _find_token_mismatches(config: LoraConfig, tokens: Mapping[str, TokenEmbeddings]) -> Iterator[str]:
    indices = config.trainable_token_indices
    if indices is not None and not tokens:
        yield "the config has trainable_token_indices, but the file holds no token embeddings"
    if isinstance(indices, tuple) and len(tokens) > 1:
        names = format_list(sorted(tokens))
        yield f"trainable_token_indices is a list for one embedding; the file holds token embeddings of {names}"
    for path, embeddings in tokens.items():
        count, rows = len(embeddings.indices), embeddings.rows
        if not count:
            yield f"{path}: token embeddings, of which the config's trainable_token_indices says nothing"
        elif rows.ndim != 2 or len(rows) != count:
            yield f"{path}: rows {tuple(rows.shape)} for {count} tokens of trainable_token_indices"


def _is_within(key: str, is_module: Callable[[str], bool]) -> bool:
    """Return whether a key (`model.score.weight`) is of a tensor in a module whose path passes a test."""
    dots = (index for index, character in enumerate(key) if character == ".")
    return any(is_module(key[:index]) for index in dots)
