"""`combine`: several adapters of one base as one."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from lora_kit.adapter.adapter import Adapter
from lora_kit.algebra.assemble import ErrorTally, UpdatesByPath, assemble_adapter, build_record, build_target_fields
from lora_kit.algebra.dense_svd import approximate_low_rank, compute_residual_norm
from lora_kit.algebra.low_rank import LowRankUpdate, sum_updates
from lora_kit.algebra.sources import AdapterLike, SourceAdapter, describe_sources, find_common_base
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import ConfigError, MergeError, format_list, suggest_nearest
from lora_kit.models.silence import silence_libraries

logger = logging.getLogger(__name__)


class WeightedUpdate(NamedTuple):
    """One adapter's share in a layer: `weight · factors`, the scaling being in the factors already."""

    factors: LowRankUpdate
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
    """One adapter of several, each with a weight, which may be negative.

    The exact sum is `Σ w_i s_i B_i A_i` at every layer that any of them covers, with each one's own scaling. How far
    the result is from what was meant is measured and recorded (`record["made"]["error"]`). PEFT's name for a method
    follows its own where the two differ.

    - `cat`: the exact sum, to the rounding of float32; ranks add.
    - `svd`: the nearest update to the sum of a rank, through QR of the factors.
    - `linear`: `(Σ √|w_i s_i| B_i)(Σ ±√|w_i s_i| A_i)`, which keeps the rank and is not the sum: the products of one
      adapter's B with another's A are in it. Equal ranks only.
    - `ties` (`ties_svd`; Yadav et al. 2023, arXiv 2306.01708), `dare_linear`, `dare_ties` (`dare_linear_svd`,
      `dare_ties_svd`; Yu et al. 2024, arXiv 2311.03099), `magnitude_prune` (`magnitude_prune_svd`): PEFT's functions on
      the dense deltas of one layer after another, as the papers have it, not on A and B; then the nearest update of a
      rank.

    Args:
        adapters: folders, names in the store or Adapters, with finite weights.
        rank: of `svd` and the pruning methods, at most; by default the largest the adapters have at each layer.
        density: of the pruning methods: the share of values that is kept, above 0 to 1.
        seed: of the methods that prune at random.
        allow: `other-base`: adapters that were made for different bases; and what else `Adapter.load` allows.

    Raises:
        BaseMismatchError: they were made for different bases.
        MergeError: a DoRA; a module saved whole for which no rule is exact; layers of different shapes.
        ConfigError: a method, rank, density or weight that is none.
        UnknownAdapterError, AdapterError: an adapter that is not there or cannot be read.

    Example:
        both = lk.combine([("adapters/sql", 0.7), ("adapters/tone", -0.3)])
        both.record["made"]["error"]["share"]
    """
    _check_combine_arguments(method, rank, density)
    weights = _parse_weights(adapters)
    parents = [SourceAdapter.of(source, allow=allow) for source, _ in adapters]
    for parent in parents:
        parent.check_linear("combined")
    base = find_common_base(parents, allow=allow)
    own = [parent.updates() for parent in parents]
    kinds = _collect_kinds(parents, own)
    saved = _collect_saved_modules(parents, weights, kinds)
    updates: dict[str, tuple[str, LowRankUpdate]] = {}
    error = ErrorTally()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path, kind in kinds.items():
            terms = _collect_terms(path, parents, own, weights)
            updates[path] = kind, _combine_layer(path, terms, method, rank, density, error)
    if method == "linear":
        _warn_about_linear(error)
    made: dict[str, Any] = {"by": "combine", "method": method, "parents": describe_sources(parents, weights)}
    made |= {"rank": rank} if rank else {}
    made |= {"density": density, "seed": seed} if method in PRUNING_METHODS else {}
    record = build_record(parents, base, made | {"error": error.to_json()})
    return assemble_adapter(
        _build_combined_config([parent.adapter.config for parent in parents], list(kinds)),
        updates,
        saved,
        record=record,
    )


def _check_combine_arguments(method: str, rank: int | None, density: float | None) -> None:
    if method not in METHODS:
        raise ConfigError(
            f"method {method!r} is not known", hint=suggest_nearest(method, METHODS) or format_list(METHODS)
        )
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank={rank!r} was given; a whole number from 1 is expected")
    if rank is not None and method in ("cat", "linear"):
        raise ConfigError(f"{method!r} takes no rank", hint="svd is the nearest of a rank; or resize the result")
    if (density is not None) != (method in PRUNING_METHODS):
        told = "needs a density" if density is None else "takes no density"
        raise ConfigError(
            f"{method!r} {told}", hint="the share of values that is kept, of " + format_list(PRUNING_METHODS)
        )
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"density={density!r} was given; a number above 0 up to 1 is expected")


def _parse_weights(adapters: Sequence[tuple[AdapterLike, float]]) -> list[float]:
    try:
        found = [float(weight) for _, weight in adapters]
    except (TypeError, ValueError):
        raise ConfigError("a list of (adapter, weight) was expected", hint='[("sql", 0.7), ("tone", -0.3)]') from None
    if not found or not all(math.isfinite(weight) and weight for weight in found):
        raise ConfigError(f"weights {found} were given; at least one, finite and none of them 0, are expected")
    return found


def _collect_kinds(parents: Sequence[SourceAdapter], own: Sequence[UpdatesByPath]) -> dict[str, str]:
    """The kind of every layer that any of the adapters covers; where two cover one, they must agree on it."""
    seen: dict[str, tuple[str, tuple[int, int], str]] = {}
    misfits = []
    for parent, updates in zip(parents, own, strict=True):
        for path, (kind, factors) in updates.items():
            first = seen.setdefault(path, (kind, factors.shape, parent.name))
            if first[:2] != (kind, factors.shape):
                misfits.append(
                    f"{path}: {first[0]} {first[1]} in {first[2]!r}, {kind} {factors.shape} in {parent.name!r}"
                )
    if misfits:
        raise MergeError(
            f"layers of different shapes cannot be combined: {format_list(misfits)}", hint="is it one base?"
        )
    return {path: kind for path, (kind, _, _) in seen.items()}


def _collect_saved_modules(
    parents: Sequence[SourceAdapter], weights: Sequence[float], paths: Collection[str]
) -> dict[str, Tensor]:
    """Modules saved whole: exact is only to take one as it is, from the one adapter that has it, with weight 1."""
    owners: dict[str, str] = {}
    found: dict[str, Tensor] = {}
    for parent, weight in zip(parents, weights, strict=True):
        saved = parent.adapter.saved()
        if saved and weight != 1:
            raise MergeError(
                f"{parent.name!r} replaces {format_list(sorted(saved))} (modules_to_save), of which there is no share "
                f"of "
                f"{weight:g}",
                hint="give it weight 1",
            )
        for key in saved:
            if key in owners:
                raise MergeError(
                    f"{owners[key]!r} and {parent.name!r} both replace {key} (modules_to_save), and it can be only one",
                    hint="combine adapters with one head among them",
                )
            owners[key] = parent.name
        found |= saved
    both = sorted({key.rpartition(".")[0] for key in found} & set(paths))
    if both:
        raise MergeError(f"one adapter replaces what another changes: {format_list(both)} (modules_to_save)")
    return found


def _build_combined_config(configs: Sequence[LoraConfig], paths: Sequence[str]) -> LoraConfig:
    tasks = {config.task_type for config in configs if config.task_type}
    if len(tasks) > 1:
        raise MergeError(f"the adapters were made for different tasks: {format_list(sorted(tasks))} (task_type)")
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
    path: str, parents: Sequence[SourceAdapter], own: Sequence[UpdatesByPath], weights: Sequence[float]
) -> list[WeightedUpdate]:
    return [
        WeightedUpdate(updates[path][1], parent.adapter.config.scaling_of(path), weight)
        for parent, updates, weight in zip(parents, own, weights, strict=True)
        if path in updates
    ]


def _combine_layer(
    path: str, terms: Sequence[WeightedUpdate], method: str, rank: int | None, density: float | None, error: ErrorTally
) -> LowRankUpdate:
    """The update of one layer; what it misses is added to the error."""
    most = rank or max(term.factors.rank for term in terms)
    if density is not None:
        dense = _prune_and_sum(terms, method, density)
        made = approximate_low_rank(dense, rank=most)
        error.add(path, compute_residual_norm(dense, made), float(dense.double().norm()))
        return made
    exact = sum_updates(term.factors.scale_by(term.weight) for term in terms)
    if method == "linear":
        made = _combine_factors_linearly(path, terms)
    else:
        made = exact if method == "cat" or exact.rank <= most else exact.svd().best(most)
    error.compare(path, made, exact)
    return made


def _combine_factors_linearly(path: str, terms: Sequence[WeightedUpdate]) -> LowRankUpdate:
    """PEFT's `linear`: sums of the factors, each with the root of its weight and scaling, the sign on A."""
    ranks = sorted({term.factors.rank for term in terms})
    if len(ranks) > 1:
        raise MergeError(
            f"{path}: 'linear' adds factors of one rank; {' and '.join(map(str, ranks))} were given",
            hint="cat and svd take any ranks",
        )
    shares = [(term, math.sqrt(abs(term.weight * term.scaling))) for term in terms]
    b = torch.stack([term.factors.b * (root / term.scaling) for term, root in shares]).sum(0)
    a = torch.stack([term.factors.a * math.copysign(root, term.weight * term.scaling) for term, root in shares]).sum(0)
    return LowRankUpdate(b, a)


def _prune_and_sum(terms: Sequence[WeightedUpdate], method: str, density: float) -> Tensor:
    """PEFT's function of that name on dense deltas: float32 (out, in)."""
    with silence_libraries():
        from peft.utils import merge_utils

    run: Callable[..., Tensor] = getattr(merge_utils, method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a density of 1 prunes nothing is what was asked for
        return run([term.factors.dense() for term in terms], torch.tensor([term.weight for term in terms]), density)


def _warn_about_linear(error: ErrorTally) -> None:
    logger.warning(
        "'linear' is not the sum of the adapters: it is off by %.1f%% of it, at most by %.1f%% (%s); "
        "'cat' is exact, and 'svd' is the nearest of a rank",
        100 * error.share,
        100 * error.worst,
        error.path,
    )
