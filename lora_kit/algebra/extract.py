"""`extract`: the difference between two model folders, as an adapter of the first."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from lora_kit.adapter.adapter import Adapter
from lora_kit.algebra.arguments import check_share, check_whole_number
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
from lora_kit.targets.coverage import Coverage, find_shortest_names
from lora_kit.targets.fingerprint import fingerprint
from lora_kit.targets.layer_target import LayerTarget
from lora_kit.torch_utils import is_finite

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
    """Return the adapter that turns a base into a full fine-tune of it, as nearly as its ranks allow.

    The files of both are read tensor by tensor. At every linear layer that differs, the adapter has the update nearest
    to the difference: of the given rank, or of the smallest rank that keeps a share of it. How far each is from the
    difference is recorded (`record["made"]["error"]`). A classification head that only the fine-tune has goes into
    `modules_to_save`.

    Args:
        base: hub id, local folder or `kit-base`.
        tuned: the same, of one architecture with the base.
        rank: of every layer, at most.
        energy: the share of `‖difference‖²` that every layer keeps at least, above 0 to 1.
        others: what to do with differences that no LoRA weights can hold (norms, biases, embeddings, tied weights):
            `list` leaves them out and names them, in a warning and in `record["made"]["left_out"]`; `save` puts their
            modules into `modules_to_save`.
        progress: is called with the bytes compared so far and the bytes in all.

    Raises:
        MergeError: the two are not of one architecture, do not differ, or differ in what no adapter can hold.
        BaseModelError: one of them cannot be read.
        ConfigError: not exactly one of rank and energy is given, or it is invalid.
    """
    _check_extract_arguments(rank, energy, others)
    one, two = open_model_pair(base, tuned)
    differences = _find_differences(one, two, rank, energy, progress)
    whole = _choose_saved_modules(one, two, differences, others)
    saved = {key: tensor for path in whole for key, tensor in _copy_module(two.meta.model, path).items()}
    low_rank = {path: one for path, one in differences.low_rank.items() if not _is_inside(path, whole)}
    left_out = [key for key in differences.others if not _is_inside(key, whole)]
    if not low_rank and not saved:
        raise MergeError(
            f"nothing of {escape_text(tuned)} that an adapter could hold differs from {escape_text(base)}",
            hint=f"it differs in {format_list(left_out)}" if left_out else "the weights are the same",
        )
    _log_caveats(differences, left_out)
    error = ErrorTally()
    for path, approximation in low_rank.items():
        error.add(path, approximation.distance, approximation.norm)
    provenance = {"by": "extract", "tuned": str(tuned), "rank": rank, "energy": energy, "left_out": left_out}
    record = {
        "base": fingerprint(one.meta.model, name=str(base)),
        PROVENANCE: {**provenance, "error": error.to_json()},
        **two.head.record_fields,
    }
    config = _build_extracted_config(one.meta.model, list(low_rank), whole, base=str(base), task=two.head.task)
    updates = {path: ("linear", approximation.update) for path, approximation in low_rank.items()}
    adapter = assemble_adapter(config, updates, saved, record=record)
    match_adapter(Path(tuned).name, adapter, one.meta.model, dtype=torch.float32)
    return adapter


def _log_caveats(differences: _Differences, left_out: Sequence[str]) -> None:
    """Log what is damaged in one of the models, and what of the difference the adapter does not have."""
    if differences.not_finite:
        names = format_list(differences.not_finite)
        logger.warning("the fine-tune or its base has NaN or infinity in %s: is its file damaged?", names)
    if left_out:
        message = "left out, since no LoRA weights can hold it, is what differs in %s; others='save' saves its modules"
        logger.warning(message, format_list(left_out, most=40))


def _check_extract_arguments(rank: int | None, energy: float | None, others: str) -> None:
    if (rank is None) == (energy is None):
        raise ConfigError("exactly one of rank and energy is expected", hint="rank=16, or energy=0.99")
    if rank is not None:
        check_whole_number("rank", rank)
    if energy is not None:
        check_share("energy", energy)
    if others not in (LIST_OTHERS, SAVE_OTHERS):
        raise ConfigError(f"others={others!r} was given; {LIST_OTHERS!r} or {SAVE_OTHERS!r} is expected")


# What differs


class _Approximation(NamedTuple):
    """The nearest update to a difference.

    Attributes:
        update: of low rank.
        distance: `‖update - difference‖`.
        norm: `‖difference‖`.
    """

    update: LowRankUpdate
    distance: float
    norm: float


@dataclass
class _Differences:
    """What differs between two models.

    Attributes:
        low_rank: differences of linear layers, approximated, by path.
        others: state dict keys of differences that no LoRA weights can hold.
        new: keys that the base lacks.
        not_finite: keys of tensors of either model that have NaN or infinity.
    """

    low_rank: dict[str, _Approximation] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)


def _find_differences(
    one: ModelFolder,
    two: ModelFolder,
    rank: int | None,
    energy: float | None,
    progress: Callable[[int, int], None] | None,
) -> _Differences:
    first, second, differences = one.state, two.state, _Differences()
    done, total = 0, sum(tensor.nbytes for tensor in second.values())
    for key, tensor in second.items():
        path = key.rpartition(".")[0]
        if not all(is_finite(side) for side in (tensor, first.get(key, tensor)) if not side.is_meta):
            differences.not_finite.append(key)
        if key in one.meta.missing:
            differences.new.append(key)
        elif not tensor.is_meta and _is_different(first[key], tensor):
            if _is_adaptable(key, one.meta, two.meta):
                transposed = is_stored_transposed(one.meta.model.get_submodule(path))
                approximation = _approximate_difference(path, first[key], tensor, transposed, rank, energy)
                differences.low_rank[path] = approximation
            else:
                differences.others.append(key)
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)
    differences.others += _find_unplaced_differences(one, two)
    return differences


def _find_unplaced_differences(one: ModelFolder, two: ModelFolder) -> Iterator[str]:
    """Yield the names of stored tensors that differ and that transformers keeps in another form (fused experts)."""
    if not one.meta.converted and not two.meta.converted:
        return
    first, second = one.unplaced_tensors, two.unplaced_tensors
    for name in sorted((first.keys() | second.keys()) - {*one.meta.unclaimed, *two.meta.unclaimed}):
        if name not in first or name not in second or _is_different(first[name], second[name]):
            yield name


def _is_different(before: Tensor, after: Tensor) -> bool:
    """Whether a fine-tune differs from its base, in the dtype of the fine-tune."""
    return before.shape != after.shape or not torch.equal(before.to(after.dtype), after)


def _is_adaptable(key: str, one: MetaModel, two: MetaModel) -> bool:
    """Whether LoRA weights can hold this difference: that of the weight of one linear layer, and of nothing else."""
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
    update = approximate_low_rank(difference, rank=rank, energy=energy)
    return _Approximation(update, compute_residual_norm(difference, update), norm)


# modules_to_save


def _choose_saved_modules(one: ModelFolder, two: ModelFolder, differences: _Differences, others: str) -> list[str]:
    """Return the paths for `modules_to_save`: what the base lacks and, with `save`, every other difference."""
    keys = list(differences.new)
    if others == SAVE_OTHERS:
        unplaced = [key for key in differences.others if key not in two.state]
        if unplaced:
            raise MergeError(
                f"{format_list(unplaced)} differ, which transformers keeps in another form: no adapter holds them",
                hint="leave them out with others='list'",
            )
        # A weight that is tied to one of them changes with it, in the fine-tune as well.
        keys += [
            tied
            for key in differences.others
            for tied in {key, *two.meta.find_tied_keys(key), *one.meta.find_tied_keys(key)}
        ]
    paths = sorted({key.rpartition(".")[0] for key in keys})
    if "" in paths:
        raise MergeError("a parameter of the model itself differs, and no module can be saved for it")
    return [path for path in paths if not _is_inside(path, [other for other in paths if other != path])]


def _copy_module(model: nn.Module, path: str) -> dict[str, Tensor]:
    """Return all tensors of a module by their keys; floating ones in float32."""
    own = select_module_tensors(model.state_dict(), path)
    return {f"{path}.{key}": tensor.float() if tensor.is_floating_point() else tensor for key, tensor in own.items()}


def _is_inside(path: str, modules: Sequence[str]) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def _build_extracted_config(
    model: nn.Module, paths: Sequence[str], whole: Sequence[str], *, base: str, task: str | None
) -> LoraConfig:
    modules = {path: model.get_submodule(path) for path in paths}
    targets = tuple(LayerTarget(path, "linear", *features_of(module), 1, 1.0) for path, module in modules.items())
    return LoraConfig(
        target_modules=find_shortest_names(model, Coverage(targets, (), 0, (), ())) if paths else (),
        modules_to_save=tuple(whole),
        fan_in_fan_out=any(map(is_stored_transposed, modules.values())),
        base_model_name_or_path=base,
        task_type=task,
        inference_mode=True,
    )
