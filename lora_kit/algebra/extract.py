"""`extract`: the difference of two model folders as an adapter of the first."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from lora_kit.adapter.adapter import Adapter
from lora_kit.algebra.assemble import PROVENANCE, ErrorTally, assemble_adapter
from lora_kit.algebra.dense_svd import approximate_low_rank, compute_residual_norm, compute_squared_norm
from lora_kit.algebra.low_rank import LowRankUpdate
from lora_kit.algebra.model_pair import ModelFolder, open_model_pair
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import ConfigError, MergeError, format_list
from lora_kit.io.text import escape_text
from lora_kit.layers.introspect import features_of, is_stored_transposed, kind_of
from lora_kit.merging.checkpoint.meta_model import MetaModel
from lora_kit.targets.compatibility import match_adapter, select_module_tensors
from lora_kit.targets.coverage import Coverage, LayerTarget, find_shortest_names
from lora_kit.targets.fingerprint import fingerprint

logger = logging.getLogger(__name__)

LIST_OTHERS: Final = "list"
SAVE_OTHERS: Final = "save"


def extract(
    base: str | Path,
    tuned: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    others: str = LIST_OTHERS,
    progress: Callable[[int, int], None] | None = None,
) -> Adapter:
    """An adapter of a base that makes it, as nearly as its ranks allow, what a full fine-tune has made of it.

    Tensor by tensor from the files of both: at every linear layer that differs, the nearest update to the difference of
    a rank, or of as small a rank as keeps a share of it. What each misses is recorded (`record["made"]["error"]`). A
    classification head that only the fine-tune has is saved whole.

    Args:
        base, tuned: hub ids, local folders or `kit-base`; of one architecture.
        rank: of every pair, at most. energy: the share of `‖difference‖²` that every pair keeps at least, above 0 to 1.
        others: what becomes of differences that no pair can hold (norms, biases, embeddings, tied weights): `list`
            leaves them out and names them, in a warning and in `record["made"]["left_out"]`; `save` saves their modules
            whole.
        progress: is given the bytes compared so far and in all.

    Raises:
        MergeError: the two are not of one architecture, or do not differ; or what differs cannot be saved whole.
        BaseModelError: one of them cannot be read.
        ConfigError: not exactly one of rank and energy, or one that is none.
    """
    _check_extract_arguments(rank, energy, others)
    one, two = open_model_pair(base, tuned)
    found = _find_differences(one, two, rank, energy, progress)
    whole = _choose_saved_modules(one, two, found.others, found.new, others)
    saved = {key: tensor for path in whole for key, tensor in _copy_module(two.outline, path).items()}
    pairs = {path: pair for path, pair in found.pairs.items() if not _is_inside(path, whole)}
    left_out = [key for key in found.others if not _is_inside(key, whole)]
    if not pairs and not saved:
        raise MergeError(
            f"nothing of {escape_text(tuned)} that an adapter could hold differs from {escape_text(base)}",
            hint=f"it differs in {format_list(left_out)}" if left_out else "the weights are the same",
        )
    if left_out:
        logger.warning(
            "left out, as no low-rank pair can hold it, is what differs in %s; others='save' saves it whole",
            format_list(left_out, most=40),
        )
    made = {"by": "extract", "tuned": str(tuned), "rank": rank, "energy": energy, "left_out": left_out}
    record: dict[str, Any] = {"base": fingerprint(one.outline.model, name=str(base))}
    error = ErrorTally()
    for path, pair in pairs.items():
        error.add(path, pair.missed, pair.norm)
    record[PROVENANCE] = {**made, "error": error.to_json()}
    if two.head.labels:
        record["labels"] = list(two.head.labels)
    config = _build_extracted_config(one.outline.model, list(pairs), whole, base=str(base), task=two.head.task)
    updates = {path: ("linear", pair.factors) for path, pair in pairs.items()}
    adapter = assemble_adapter(config, updates, saved, record=record)
    match_adapter(Path(tuned).name, adapter, one.outline.model, dtype=torch.float32)
    return adapter


def _check_extract_arguments(rank: int | None, energy: float | None, others: str) -> None:
    if (rank is None) == (energy is None):
        raise ConfigError("exactly one of rank and energy is expected", hint="rank=16, or energy=0.99")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank={rank!r} was given; a whole number from 1 is expected")
    number = isinstance(energy, (int, float)) and not isinstance(energy, bool)
    if energy is not None and not (number and 0 < energy <= 1):
        raise ConfigError(f"energy={energy!r} was given; a number above 0 up to 1 is expected")
    if others not in (LIST_OTHERS, SAVE_OTHERS):
        raise ConfigError(f"others={others!r} was given; {LIST_OTHERS!r} or {SAVE_OTHERS!r} is expected")


# What differs


class _Approximation(NamedTuple):
    """What is kept of a difference, how far that is from it, and how large it is."""

    factors: LowRankUpdate
    missed: float
    norm: float


@dataclass
class _Differences:
    """What differs between two models.

    Attributes:
        pairs: updates of linear layers, by path. others: keys that no pair can hold. new: keys that the base lacks.
    """

    pairs: dict[str, _Approximation]
    others: list[str]
    new: list[str]


def _find_differences(
    one: ModelFolder,
    two: ModelFolder,
    rank: int | None,
    energy: float | None,
    progress: Callable[[int, int], None] | None,
) -> _Differences:
    first, second = one.state, two.state
    found = _Differences({}, [], [])
    done, total = 0, sum(tensor.nbytes for tensor in second.values())
    for key, tensor in second.items():
        path = key.rpartition(".")[0]
        if key in one.outline.missing:
            found.new.append(key)
        elif not tensor.is_meta and _is_different(first[key], tensor):
            if _can_hold(key, one.outline, two.outline):
                transposed = is_stored_transposed(one.outline.model.get_submodule(path))
                found.pairs[path] = _approximate_difference(path, first[key], tensor, transposed, rank, energy)
            else:
                found.others.append(key)
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)
    found.others += _find_unplaced_differences(one, two)
    return found


def _find_unplaced_differences(one: ModelFolder, two: ModelFolder) -> Iterator[str]:
    """Names of stored tensors that differ and that transformers keeps in another form (fused experts)."""
    if not one.outline.converted and not two.outline.converted:
        return
    first, second = one.unplaced_tensors, two.unplaced_tensors
    for name in sorted((first.keys() | second.keys()) - {*one.outline.unclaimed, *two.outline.unclaimed}):
        if name not in first or name not in second or _is_different(first[name], second[name]):
            yield name


def _is_different(before: Tensor, after: Tensor) -> bool:
    """Whether a fine-tune has other numbers than its base has in the dtype it keeps them in."""
    return before.shape != after.shape or not torch.equal(before.to(after.dtype), after)


def _can_hold(key: str, one: MetaModel, two: MetaModel) -> bool:
    """Whether a low-rank pair can hold what differs here: the weight of one linear layer, and of nothing else."""
    path, _, leaf = key.rpartition(".")
    alone = len(one.find_tied_keys(key)) == 1 == len(two.find_tied_keys(key))
    return leaf == "weight" and alone and kind_of(one.model.get_submodule(path)) == "linear"


def _approximate_difference(
    path: str, before: Tensor, after: Tensor, transposed: bool, rank: int | None, energy: float | None
) -> _Approximation:
    difference = after.to(torch.float32, copy=True).sub_(before)
    difference = difference.T.contiguous() if transposed else difference
    norm = math.sqrt(compute_squared_norm(difference))
    if not math.isfinite(norm):
        raise MergeError(f"{path}: the difference holds NaN or infinity")
    made = approximate_low_rank(difference, rank=rank, energy=energy)
    return _Approximation(made, compute_residual_norm(difference, made), norm)


# What is saved whole


def _choose_saved_modules(
    one: ModelFolder, two: ModelFolder, others: Sequence[str], new: Sequence[str], how: str
) -> list[str]:
    """Paths of the modules to save whole: those the base lacks, and those of all other differences if asked to."""
    keys = list(new)
    if how == SAVE_OTHERS:
        unplaced = [key for key in others if key not in two.state]
        if unplaced:
            raise MergeError(
                f"{format_list(unplaced)} differ, which transformers keeps in another form: no adapter holds them",
                hint="leave them out with others='list'",
            )
        # What is tied to one of them changes with it, in the fine-tune as well.
        keys += [
            tied for key in others for tied in {key, *two.outline.find_tied_keys(key), *one.outline.find_tied_keys(key)}
        ]
    paths = sorted({key.rpartition(".")[0] for key in keys})
    if "" in paths:
        raise MergeError("a parameter of the model itself differs, and no module can be saved for it")
    return [path for path in paths if not _is_inside(path, [other for other in paths if other != path])]


def _copy_module(found: MetaModel, path: str) -> dict[str, Tensor]:
    """All tensors of a module by their keys, as copies that do not need the files."""
    inside = select_module_tensors(
        {key: tensor.detach() for key, tensor in found.model.state_dict(keep_vars=True).items()}, path
    )
    return {f"{path}.{key}": tensor.float() if tensor.is_floating_point() else tensor for key, tensor in inside.items()}


def _is_inside(path: str, modules: Sequence[str]) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def _build_extracted_config(
    model: nn.Module, paths: Sequence[str], whole: Sequence[str], *, base: str, task: str | None
) -> LoraConfig:
    modules = {path: model.get_submodule(path) for path in paths}
    targets = tuple(LayerTarget(path, "linear", *features_of(module), 1, 1.0) for path, module in modules.items())
    fields: Mapping[str, Any] = {"base_model_name_or_path": base, "task_type": task, "inference_mode": True}
    return LoraConfig(
        target_modules=find_shortest_names(model, Coverage(targets, (), 0, (), ())) if paths else (),
        modules_to_save=tuple(whole),
        fan_in_fan_out=any(map(is_stored_transposed, modules.values())),
        **fields,
    )
