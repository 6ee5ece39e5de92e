"""`combine`: one adapter made of several of the same base."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_like import AdapterLike
from lora_kit.algebra.arguments import check_share, check_whole_number
from lora_kit.algebra.assemble import ErrorTally, UpdatesByPath, assemble_adapter, build_record, build_target_fields
from lora_kit.algebra.dense_svd import approximate_low_rank, compute_residual_norm
from lora_kit.algebra.low_rank import LowRankUpdate, sum_updates
from lora_kit.algebra.sources import SourceAdapter, describe_sources, find_common_base
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import ConfigError, MergeError, format_list, suggest_nearest
from lora_kit.models.silence import silence_libraries
from lora_kit.models.tasks import find_task_by_peft_type

logger = logging.getLogger(__name__)


class WeightedUpdate(NamedTuple):
    """One adapter's share in a layer: `weight · update`.

    Attributes:
        update: with the scaling in its factors.
        scaling: that scaling.
        weight: given by the caller.
    """

    update: LowRankUpdate
    scaling: float
    weight: float


EXACT_METHODS: Final = ("cat", "svd", "linear")
PRUNING_METHODS: Final = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
METHODS: Final = (*EXACT_METHODS, *PRUNING_METHODS)


def combine(
    adapters: Sequence[tuple[AdapterLike, float]],
    *,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    allow: Collection[str] = (),
) -> Adapter:
    """Return one adapter made of several, each with a weight, which may be negative.

    The exact sum is `Σ w_i s_i B_i A_i` at every layer that any of them covers, with each one's own scaling. The
    distance of the result from it is measured and recorded (`record["made"]["error"]`). Where PEFT calls a method by
    another name, that name follows in brackets.

    - `cat`: the exact sum, to the rounding of float32; ranks add.
    - `svd`: the update of the given rank that is nearest to the sum, through QR of the factors.
    - `linear`: `(Σ √|w_i s_i| B_i)(Σ ±√|w_i s_i| A_i)`, which keeps the rank but is not the sum: it also holds the
      products of one adapter's B with another's A. Equal ranks only.
    - `ties` (`ties_svd`; Yadav et al. 2023, arXiv 2306.01708), `dare_linear`, `dare_ties` (`dare_linear_svd`,
      `dare_ties_svd`; Yu et al. 2024, arXiv 2311.03099), `magnitude_prune` (`magnitude_prune_svd`): PEFT's functions on
      the dense deltas of one layer after another, as in the papers, not on A and B; then the nearest update of the
      given rank.

    Args:
        adapters: folders, names in the store or Adapters, with finite weights.
        rank: of `svd` and the pruning methods, at most; by default the largest rank of the adapters at each layer.
        density: of the pruning methods: the share of values that is kept, above 0 to 1.
        seed: of the methods that prune randomly.
        allow: `other-base`: adapters that were made for different bases; and what else `Adapter.load` allows.

    Raises:
        BaseMismatchError: they were made for different bases.
        MergeError: one is a DoRA; `modules_to_save` that cannot be combined exactly; layers of different shapes.
        ConfigError: a method, rank, density or weight is invalid.
        UnknownAdapterError, AdapterError: an adapter is not there or cannot be read.

    Example:
        both = lk.combine([("adapters/sql", 0.7), ("adapters/tone", -0.3)])
        both.record["made"]["error"]["share"]
    """
    _check_combine_arguments(method, rank, density)
    weights = _parse_weights(adapters)
    sources = _load_sources([source for source, _ in adapters], allow)
    base = find_common_base(sources, allow=allow)
    own = [source.updates() for source in sources]
    kinds = _collect_kinds(sources, own)
    saved = _collect_saved_modules(sources, weights, kinds)
    updates: dict[str, tuple[str, LowRankUpdate]] = {}
    error = ErrorTally()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path, kind in kinds.items():
            terms = _collect_terms(path, sources, own, weights)
            updates[path] = kind, _combine_layer(path, terms, method, rank, density, error)
    _warn_if_inexact(method, error)
    provenance = _describe_method(method, rank=rank, density=density, seed=seed)
    provenance |= {"parents": describe_sources(sources, weights), "error": error.to_json()}
    config = _build_combined_config([source.adapter.config for source in sources], list(kinds))
    return assemble_adapter(config, updates, saved, record=build_record(sources, base, provenance))


def _load_sources(adapters: Sequence[AdapterLike], allow: Collection[str]) -> list[SourceAdapter]:
    sources = [SourceAdapter.of(adapter, allow=allow) for adapter in adapters]
    for source in sources:
        source.check_linear("combined")
    return sources


def _describe_method(method: str, *, rank: int | None, density: float | None, seed: int) -> dict[str, object]:
    arguments = {"rank": rank} if rank else {}
    pruning = {"density": density, "seed": seed} if method in PRUNING_METHODS else {}
    return {"by": "combine", "method": method, **arguments, **pruning}


def _check_combine_arguments(method: str, rank: int | None, density: float | None) -> None:
    if method not in METHODS:
        raise ConfigError(
            f"method {method!r} is not known", hint=suggest_nearest(method, METHODS) or format_list(METHODS)
        )
    if rank is not None:
        check_whole_number("rank", rank)
    if rank is not None and method in ("cat", "linear"):
        raise ConfigError(f"{method!r} takes no rank", hint="choose svd, or resize the result")
    if (density is not None) != (method in PRUNING_METHODS):
        message = "needs a density" if density is None else "takes no density"
        hint = f"density is the share of values that {format_list(PRUNING_METHODS)} keep"
        raise ConfigError(f"{method!r} {message}", hint=hint)
    if density is not None:
        check_share("density", density)


def _parse_weights(adapters: Sequence[tuple[AdapterLike, float]]) -> list[float]:
    try:
        weights = [float(weight) for _, weight in adapters]
    except (TypeError, ValueError):
        raise ConfigError("a list of (adapter, weight) was expected", hint='[("sql", 0.7), ("tone", -0.3)]') from None
    if not weights or not all(math.isfinite(weight) and weight for weight in weights):
        raise ConfigError(f"weights {weights} were given; at least one, finite and none of them 0, are expected")
    return weights


def _collect_kinds(sources: Sequence[SourceAdapter], own: Sequence[UpdatesByPath]) -> dict[str, str]:
    """Return the kind of every layer that any of the adapters covers."""
    first_seen: dict[str, tuple[str, tuple[int, int], str]] = {}
    mismatches = []
    for source, updates in zip(sources, own, strict=True):
        for path, (kind, update) in updates.items():
            first = first_seen.setdefault(path, (kind, update.shape, source.name))
            if first[:2] != (kind, update.shape):
                one, other = f"{first[0]} {first[1]} in {first[2]!r}", f"{kind} {update.shape} in {source.name!r}"
                mismatches.append(f"{path}: {one}, {other}")
    if mismatches:
        message = f"layers of different shapes cannot be combined: {format_list(mismatches)}"
        raise MergeError(message, hint="combine adapters of one base")
    return {path: kind for path, (kind, _, _) in first_seen.items()}


def _collect_saved_modules(
    sources: Sequence[SourceAdapter], weights: Sequence[float], paths: Collection[str]
) -> dict[str, Tensor]:
    """Return the tensors of `modules_to_save`: each from the one adapter that has it, with weight 1, as it is."""
    owners: dict[str, str] = {}
    combined: dict[str, Tensor] = {}
    for source, weight in zip(sources, weights, strict=True):
        saved = source.adapter.saved()
        if saved and weight != 1:
            message = (
                f"{source.name!r} replaces {format_list(sorted(saved))} (modules_to_save), which cannot be weighted"
            )
            raise MergeError(f"{message} by {weight:g}", hint="give it weight 1")
        for key in saved:
            if key in owners:
                message = f"{owners[key]!r} and {source.name!r} both replace {key} (modules_to_save)"
                raise MergeError(message, hint="combine adapters of which only one has that head")
            owners[key] = source.name
        combined |= saved
    both = sorted({key.rpartition(".")[0] for key in combined} & set(paths))
    if both:
        raise MergeError(f"one adapter replaces what another changes: {format_list(both)} (modules_to_save)")
    return combined


def _build_combined_config(configs: Sequence[LoraConfig], paths: Sequence[str]) -> LoraConfig:
    tasks = {config.task_type for config in configs if config.task_type}
    if len(tasks) > 1:
        names = [spec.name if (spec := find_task_by_peft_type(task)) else task for task in sorted(tasks)]
        raise MergeError(
            f"the adapters are for different tasks: {format_list(names)}", hint="combine those of one task"
        )
    names = [config.base_model_name_or_path for config in configs if config.base_model_name_or_path]
    return LoraConfig(
        **build_target_fields(configs, paths),
        modules_to_save=tuple(dict.fromkeys(name for config in configs for name in config.modules_to_save)),
        fan_in_fan_out=any(config.fan_in_fan_out for config in configs),
        base_model_name_or_path=names[0] if names else None,
        task_type=next(iter(tasks), None),
        inference_mode=True,
    )


def _collect_terms(
    path: str, sources: Sequence[SourceAdapter], own: Sequence[UpdatesByPath], weights: Sequence[float]
) -> list[WeightedUpdate]:
    return [
        WeightedUpdate(updates[path][1], source.adapter.config.scaling_of(path), weight)
        for source, updates, weight in zip(sources, own, weights, strict=True)
        if path in updates
    ]


def _combine_layer(
    path: str, terms: Sequence[WeightedUpdate], method: str, rank: int | None, density: float | None, error: ErrorTally
) -> LowRankUpdate:
    """Return the update of one layer, and add its distance from the exact one to the error."""
    most = rank or max(term.update.rank for term in terms)
    if density is not None:
        dense = _prune_and_sum(terms, method, density)
        update = approximate_low_rank(dense, rank=most)
        error.add(path, compute_residual_norm(dense, update), float(dense.double().norm()))
        return update
    exact = sum_updates(term.update.scale_by(term.weight) for term in terms)
    if method == "linear":
        update = _combine_factors_linearly(path, terms)
    else:
        update = exact if method == "cat" or exact.rank <= most else exact.svd().best(most)
    error.compare(path, update, exact)
    return update


def _combine_factors_linearly(path: str, terms: Sequence[WeightedUpdate]) -> LowRankUpdate:
    """Return PEFT's `linear`: sums of the factors, each times the root of |weight · scaling|, the sign in A."""
    ranks = sorted({term.update.rank for term in terms})
    if len(ranks) > 1:
        raise MergeError(
            f"{path}: 'linear' adds factors of one rank; {' and '.join(map(str, ranks))} were given",
            hint="choose cat or svd, which take any ranks",
        )
    shares = [(term, math.sqrt(abs(term.weight * term.scaling))) for term in terms]
    b = torch.stack([term.update.b * (root / term.scaling) for term, root in shares]).sum(0)
    a = torch.stack([term.update.a * math.copysign(root, term.weight * term.scaling) for term, root in shares]).sum(0)
    return LowRankUpdate(b, a)


def _prune_and_sum(terms: Sequence[WeightedUpdate], method: str, density: float) -> Tensor:
    """Return what PEFT's function of that name makes of dense deltas: float32 (out, in)."""
    with silence_libraries():
        from peft.utils import merge_utils

    run: Callable[..., Tensor] = getattr(merge_utils, method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that a density of 1 prunes nothing
        return run([term.update.dense() for term in terms], torch.tensor([term.weight for term in terms]), density)


def _warn_if_inexact(method: str, error: ErrorTally) -> None:
    if method != "linear":
        return
    logger.warning(
        "'linear' is not the sum of the adapters: it differs from it by %.1f%%, in %s by %.1f%%; "
        "'cat' is exact, and 'svd' is the nearest update of a rank",
        100 * error.share,
        error.path,
        100 * error.worst,
    )
