"""Set some rows aside for validation or for a test: the same ones, whatever the order of the rows.

Rows with the same input stay together, so that no input is both trained and validated on. A hash of the input and the
seed decides which inputs are set aside. If rows have labels, each label contributes its share, and no label is set
aside completely.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

from lora_kit.data.preparation.examine import normalize_input
from lora_kit.data.rows import Rows
from lora_kit.errors import DataError
from lora_kit.models.tasks import SINGLE_LABEL

DEFAULT_SHARE: Final = 0.05
_MIN_ROWS: Final = 20
"""Fewest rows to validate on, where the file has enough: with three rows, one more that is right is 33 points."""
_MAX_DEFAULT_SHARE: Final = 0.2
_TOO_FEW: Final = 25
"""Of a file with fewer rows, nothing is set aside: a fifth of it would say nothing, and is missed in the training."""

_Groups = Mapping[str, Sequence[int]]
"""Indices of the rows with each input."""


def choose_share(count: int) -> float:
    """Return the share of so many rows to set aside: a twentieth, but at least 20 rows, and at most a fifth.

    It is 0 for a file of fewer than 25 rows.
    """
    if count < _TOO_FEW:
        return 0.0
    return min(max(DEFAULT_SHARE, _MIN_ROWS / count), _MAX_DEFAULT_SHARE)


def split(rows: Rows, *, share: float, seed: int = 0, problem: str | None = None) -> tuple[list[int], list[int]]:
    """Return the indices of the rows to train on, and of those that are set aside, each in the order of the file.

    Args:
        share: share of the rows to set aside, above 0 and below 1; at least one row is set aside.
        seed: seed of the choice.
        problem: what the labels of texts are; only single labels contribute their share each.

    Raises:
        DataError: no row can be set aside, since all have one input.
    """
    strata = _group_by_label(rows, is_labeled=rows.format == "label" and problem in (None, SINGLE_LABEL))
    quotas = _compute_quotas({name: sum(map(len, groups.values())) for name, groups in strata.items()}, share)
    taken: list[int] = []
    for name, groups in strata.items():
        taken += _take_groups(groups, quotas[name], seed)
    if not taken:
        taken = _find_smallest_group(strata, seed)
    if not taken:
        reason = _reason_not_splittable(strata)
        what = f"{rows.path}: no row can be set aside, since {reason}"
        raise DataError(what, hint="give a file for validation, or a share of 0")
    held_out = set(taken)
    return [index for index in range(len(rows)) if index not in held_out], sorted(held_out)


def _reason_not_splittable(strata: Mapping[str, _Groups]) -> str:
    if len(strata) < 2:
        return "rows with one input stay together"
    return f"each of the {len(strata)} labels has one input only, and no label is set aside whole"


def _group_by_label(rows: Rows, *, is_labeled: bool) -> dict[str, _Groups]:
    """Return the groups that may be set aside, by label; inputs with several labels are always trained on."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, value in enumerate(rows.values):
        groups[normalize_input(rows, value)].append(index)
    strata: dict[str, dict[str, list[int]]] = defaultdict(dict)
    for text, indices in groups.items():
        labels = {str(rows.values[index][1]) for index in indices} if is_labeled else {""}
        if len(labels) == 1:
            strata[labels.pop()][text] = indices
    return {name: strata[name] for name in sorted(strata)}


def _compute_quotas(sizes: Mapping[str, int], share: float) -> dict[str, int]:
    """Return how many rows to take of each stratum, by largest remainders: together the share, and at least one."""
    exact = {name: share * size for name, size in sizes.items()}
    quotas = {name: int(quota) for name, quota in exact.items()}
    missing = max(1, round(sum(exact.values()))) - sum(quotas.values())
    for name in sorted(exact, key=lambda name: (quotas[name] - exact[name], name))[: max(0, missing)]:
        quotas[name] += 1
    return quotas


def _take_groups(groups: _Groups, quota: int, seed: int) -> list[int]:
    """Return the indices of whole groups with at most `quota` rows together; at least one group remains."""
    taken: list[int] = []
    remaining = len(groups)
    for text in sorted(groups, key=lambda text: _hash_input(text, seed)):
        if remaining > 1 and len(taken) + len(groups[text]) <= quota:
            taken += groups[text]
            remaining -= 1
    return taken


def _find_smallest_group(strata: Mapping[str, _Groups], seed: int) -> list[int]:
    """Return the indices of the smallest group that is not the only one of its stratum."""
    candidates = [group for groups in strata.values() if len(groups) > 1 for group in groups.items()]
    _, indices = min(candidates, key=lambda group: (len(group[1]), _hash_input(group[0], seed)), default=("", []))
    return list(indices)


def _hash_input(text: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}\0{text}".encode()).hexdigest()
