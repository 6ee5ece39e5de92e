"""mergekit's own merging and extracting, beside ours on the same files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from safetensors.numpy import load_file

import lora_kit as lk
from tests.programs.cases import Case, compute_with
from tests.programs.costs import LORA_KIT, run_measured
from tests.programs.logit_checks import bound_difference
from tests.programs.outcomes import Outcome
from tests.programs.printed import put_on_path, read_version

_WEIGHTS: Final = (0.7, 0.3)
_BOUND: Final = 1e-6
"""Of merged weights."""


@dataclass(frozen=True)
class MergekitCheck:
    """mergekit merges two adapters into a base, and extracts one of them from a merged model.

    Attributes:
        bases: names of bases.
        features: the two adapters.
    """

    bases: Sequence[str]
    features: tuple[str, str] = ("plain", "rslora")
    environment: str = "mergekit"
    form: str = "merged and extracted"

    def run(self, cases: Sequence[Case], *, python: Path, folder: Path) -> tuple[str, list[Outcome]]:
        """Run both, as `Check.run` says."""
        outcomes = []
        for base in self.bases:
            taken = {case.feature: case for case in cases if case.base == base}
            first, second = (taken[feature] for feature in self.features)
            here = folder / base
            here.mkdir()
            outcomes.append(_merge_two(first, second, python, here))
            outcomes += [_extract(case, python, here / str(case.feature)) for case in (first, second)]
        return f"mergekit {read_version(python, 'mergekit')}", outcomes


def _merge_two(first: Case, second: Case, python: Path, folder: Path) -> Outcome:
    """Compare every weight of `base + 0.7 · first + 0.3 · second`."""
    models = [
        {"model": f"{case.base_folder}+{case.adapter_folder}", "parameters": {"weight": weight}}
        for case, weight in zip((first, second), _WEIGHTS, strict=True)
    ]
    config = {"models": models, "merge_method": "task_arithmetic", "base_model": str(first.base_folder)}
    (folder / "merge.yaml").write_text(json.dumps({**config, "dtype": "float32"}), encoding="utf-8")
    command = [python.parent / "mergekit-yaml", folder / "merge.yaml", folder / "theirs"]
    command += ["--lora-merge-cache", folder / "cache"]
    theirs = run_measured(command, variables=put_on_path(python))
    arguments = [part for case, weight in zip((first, second), _WEIGHTS, strict=True) for part in _name(case, weight)]
    ours = run_measured([*LORA_KIT, "merge", "--base", first.base_folder, *arguments, "--out", folder / "ours"])
    difference, effect = _compare_weights(folder / "ours", folder / "theirs", first.base_folder)
    verdict = "equal" if difference <= _BOUND < effect else "wrong"
    key = f"{first.base}/{first.feature}-and-{second.feature}"
    return Outcome(key, verdict, difference=difference, bound=_BOUND, effect=effect, ours=ours, theirs=theirs)


def _name(case: Case, weight: float) -> list[str]:
    return ["--adapter", str(case.adapter_folder), "--weight", str(weight)]


def _compare_weights(ours: Path, theirs: Path, base: Path) -> tuple[float, float]:
    """Return the largest difference between weights of ours and theirs, and of ours and the base."""
    mine, other, before = (_read_weights(folder) for folder in (ours, theirs, base))
    if mine.keys() - {"lm_head.weight"} != other.keys() - {"lm_head.weight"}:
        raise RuntimeError(f"other names of weights: {sorted(mine.keys() ^ other.keys())[:3]}")
    shared = mine.keys() & other.keys()
    difference = max(float(np.abs(mine[key] - other[key]).max()) for key in shared)
    return difference, max(float(np.abs(mine[key] - before[key]).max()) for key in shared)


def _read_weights(folder: Path) -> dict[str, np.ndarray]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def _extract(case: Case, python: Path, folder: Path) -> Outcome:
    """Let mergekit extract an adapter from a model that we merged: read here, it computes what the adapter did."""
    folder.mkdir(parents=True)
    assert case.adapter_folder is not None
    lk.merge(case.base_folder, case.adapter_folder, folder / "merged")
    models = ["--model", folder / "merged", "--base-model", case.base_folder]
    command = [python.parent / "mergekit-extract-lora", *models, "--out-path", folder / "theirs", "--max-rank", "8"]
    theirs = run_measured(command, variables=put_on_path(python))
    pair = ["--base", case.base_folder, "--tuned", folder / "merged", "--rank", "8"]
    ours = run_measured([*LORA_KIT, "extract", *pair, "--out", folder / "ours"])
    differences = {
        name: float(np.abs(compute_with(case, lk.Adapter.load(folder / name)) - case.logits).max())
        for name in ("ours", "theirs")
    }
    bound = bound_difference(case)
    is_equal = all(difference <= bound for difference in differences.values())
    return Outcome(
        f"{case.key}-extracted",
        "equal" if is_equal else "wrong",
        difference=differences["theirs"],
        bound=bound,
        effect=case.effect,
        reason=None if is_equal else f"off from the adapter: {differences}",
        ours=ours,
        theirs=theirs,
    )
