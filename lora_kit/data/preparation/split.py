"""Some rows set aside for validation, the same ones whatever their order.

Rows with the same input stay together, so that nothing that is validated on was trained on. Which inputs are set aside
is decided by a hash of them and the seed. Of rows with labels each label gives its share, and no label is set aside
altogether.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

from lora_kit.data.preparation.examine import input_of
from lora_kit.data.rows import Rows
from lora_kit.errors import DataError

_Groups = Mapping[str, Sequence[int]]
"""Inputs, and the places of the rows that have them."""


def split(rows: Rows, *, share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Places of the rows to train on and of those to validate on, each in the order of the file.

    Args:
        share: of the rows that is to be set aside, above 0 and below 1; at least one row is.

    Raises:
        DataError: no row can be set aside, since all have one input.
    """
    strata = _group_by_label(rows)
    quotas = _compute_quotas({name: sum(map(len, groups.values())) for name, groups in strata.items()}, share)
    taken: list[int] = []
    for name, groups in strata.items():
        taken += _take_groups(groups, quotas[name], seed)
    if not taken:
        taken = _find_smallest_group(strata, seed)
    if not taken:
        raise DataError(
            f"{rows.path}: no row can be set aside for validation, since rows with one input stay together",
            hint="give a file for validation, or a share of 0",
        )
    aside = set(taken)
    return [place for place in range(len(rows)) if place not in aside], sorted(taken)


def _group_by_label(rows: Rows) -> dict[str, _Groups]:
    """Groups that may be set aside, by label; inputs with several labels are always trained on."""
    groups: dict[str, list[int]] = defaultdict(list)
    for place, value in enumerate(rows.values):
        groups[input_of(rows, value)].append(place)
    strata: dict[str, dict[str, list[int]]] = defaultdict(dict)
    for given, places in groups.items():
        labels = {str(rows.values[place][1]) for place in places} if rows.format == "label" else {""}
        if len(labels) == 1:
            strata[labels.pop()][given] = places
    return {name: strata[name] for name in sorted(strata)}


def _compute_quotas(sizes: Mapping[str, int], share: float) -> dict[str, int]:
    """Rows to take of each stratum, by largest remainders: together the share of all rows, and at least one."""
    exact = {name: share * size for name, size in sizes.items()}
    quotas = {name: int(wanted) for name, wanted in exact.items()}
    missing = max(1, round(sum(exact.values()))) - sum(quotas.values())
    for name in sorted(exact, key=lambda name: (quotas[name] - exact[name], name))[: max(0, missing)]:
        quotas[name] += 1
    return quotas


def _take_groups(groups: _Groups, quota: int, seed: int) -> list[int]:
    """Places of whole groups that together have no more rows than the quota; one group is always left."""
    taken: list[int] = []
    left = len(groups)
    for given in sorted(groups, key=lambda given: _hash_input(given, seed)):
        if left > 1 and len(taken) + len(groups[given]) <= quota:
            taken += groups[given]
            left -= 1
    return taken


def _find_smallest_group(strata: Mapping[str, _Groups], seed: int) -> list[int]:
    """The places of the smallest group of those that are not all their stratum has."""
    groups = [group for found in strata.values() if len(found) > 1 for group in found.items()]
    _, places = min(groups, key=lambda group: (len(group[1]), _hash_input(group[0], seed)), default=("", []))
    return list(places)


def _hash_input(given: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}\0{given}".encode()).hexdigest()
