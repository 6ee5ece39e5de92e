"""Run a program's reader on files of every case, and compare its logits with our own."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

import lora_kit as lk
from lora_kit.errors import ExportError, MergeError
from tests.programs.cases import LEAST_EFFECT, Case
from tests.programs.outcomes import Outcome
from tests.programs.printed import read_version

READERS: Final = Path(__file__).parent / "readers"
_MINUTES: Final = 30

Write = Callable[[Case, Path], Path]
"""Writes what a program reads of a case below a folder, and returns it; raises ExportError or MergeError."""
Make = Callable[[Sequence[Case], Path, Path], list[Case]]
"""Lets a program write adapters, given cases, its interpreter and a folder; the logits are those that we compute."""


def write_saved(case: Case, folder: Path) -> Path:
    """Return the adapter's folder as our bank saved it."""
    assert case.adapter_folder is not None
    return case.adapter_folder


def write_export(target: str) -> Write:
    """Return a function that exports an adapter for a target."""

    def write(case: Case, folder: Path) -> Path:
        assert case.adapter_folder is not None
        lk.export(case.adapter_folder, target, folder, base=case.base_folder, replace=True)
        return folder

    return write


def write_with_task(case: Case, folder: Path) -> Path:
    """Export for PEFT an adapter whose config names its task, by which PEFT's `AutoPeftModel` finds the class."""
    assert case.adapter_folder is not None
    adapter = lk.Adapter.load(case.adapter_folder)
    config = dataclasses.replace(adapter.config, task_type="CAUSAL_LM")
    named = lk.Adapter(config, adapter.tensors, record=adapter.record)
    lk.export(named, "peft", folder, base=case.base_folder)
    return folder


def write_merged(case: Case, folder: Path) -> Path:
    """Merge an adapter; what changes one of two tied tensors is written apart."""
    assert case.adapter_folder is not None
    lk.merge(case.base_folder, case.adapter_folder, folder, allow=["untie"], replace=True)
    return folder


def keep(cases: Sequence[Case], python: Path, folder: Path) -> list[Case]:
    """Return the cases as they are: nothing is written by the program."""
    return list(cases)


@dataclass(frozen=True)
class LogitCheck:
    """A program that computes logits with files of ours, or with its own that we read.

    Attributes:
        environment: name in `environments.ENVIRONMENTS`; None for the one that runs this.
        reader: script of `readers/`.
        form: what it reads, in a word: `saved`, `merged`, a target of `lk.export`, or how it was made.
        write: writes that form.
        make: the cases, where the program writes the adapters.
        bases: names of bases; None for all.
        features: kinds of adapters; None for all.
        wide_bounds: by base, the largest difference of logits that is right where the program computes something of the
            base less precisely.
        known_faults: by feature, or by base and feature (`qwen2/head`), what the program is known to do wrong.
        whole: whether it reads a whole model, not a base and an adapter.
        normalized: whether it gives logarithms of probabilities, not logits.
        packages: of the program, where the reader is another one and does not say its version.
    """

    environment: str | None
    reader: str
    form: str
    write: Write
    make: Make = keep
    bases: Sequence[str] | None = None
    features: Sequence[str] | None = None
    wide_bounds: Mapping[str, float] = field(default_factory=dict)
    known_faults: Mapping[str, str] = field(default_factory=dict)
    whole: bool = False
    normalized: bool = False
    packages: Sequence[str] = ()

    def takes(self, case: Case) -> bool:
        fits_base = self.bases is None or case.base in self.bases
        return fits_base and (case.feature is None or self.features is None or case.feature in self.features)

    def run(self, cases: Sequence[Case], *, python: Path, folder: Path) -> tuple[str, list[Outcome]]:
        """Run the program on the cases that it takes, as `Check.run` says."""
        taken = self.make([case for case in cases if self.takes(case)], python, folder / "made")
        jobs, outcomes = _write_jobs(self, taken, folder)
        version, results = run_reader(self.reader, [job for job, _ in jobs], python=python, folder=folder)
        for job, case in jobs:
            outcomes.append(_judge(self, case, results[job["key"]], Path(job["logits"])))
        return ", ".join([*(f"{name} {read_version(python, name)}" for name in self.packages), version]), outcomes


def _write_jobs(
    check: LogitCheck, cases: Sequence[Case], folder: Path
) -> tuple[list[tuple[dict[str, Any], Case]], list[Outcome]]:
    jobs, rejected = [], []
    for number, case in enumerate(cases):
        job = {"key": case.key, "base": str(case.base_folder), "adapter": None, "tokens": list(case.tokens)}
        job["logits"] = str(folder / f"{number}.npy")
        if case.feature is not None:
            try:
                written = check.write(case, folder / "files" / case.base / case.feature)
            except (ExportError, MergeError) as error:
                rejected.append(Outcome(case.key, "rejected", reason=" ".join(str(error).split())))
                continue
            job["base" if check.whole else "adapter"] = str(written)
        jobs.append((job, case))
    return jobs, rejected


def run_reader(
    reader: str, jobs: Sequence[Mapping[str, Any]], *, python: Path, folder: Path
) -> tuple[str, dict[str, dict[str, Any]]]:
    """Run a script of `readers/` on jobs, and return the program's version and the results by key.

    Raises:
        RuntimeError: it wrote no results.
    """
    questions, answers = folder / "jobs.json", folder / "results.json"
    questions.write_text(json.dumps(jobs), encoding="utf-8")
    command = [python, READERS / f"{reader}.py", questions, answers]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60 * _MINUTES)
    if not answers.is_file():
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise RuntimeError(f"{reader} ended with {done.returncode}: {' '.join(last)}")
    written = json.loads(answers.read_text(encoding="utf-8"))
    return written["version"], {result["key"]: result for result in written["results"]}


def _judge(check: LogitCheck, case: Case, result: Mapping[str, Any], file: Path) -> Outcome:
    fault = check.known_faults.get(case.key, check.known_faults.get(case.feature or ""))
    if result["error"] is not None:
        return Outcome(case.key, "known" if fault else "failed", reason=fault or result["error"])
    logits, ours = np.load(file)[:, : case.logits.shape[1]], case.logits
    if check.normalized:
        ours = _normalize(ours)
    difference = float(np.abs(logits - ours).max())
    bound = check.wide_bounds.get(case.base, bound_difference(case))
    is_equal = np.isfinite(difference) and difference <= bound
    if case.feature is not None and case.effect < LEAST_EFFECT:
        raise RuntimeError(f"{case.key}: the adapter changes logits by {case.effect:.2g}, too little to be seen")
    return Outcome(
        case.key,
        "equal" if is_equal else "known" if fault else "wrong",
        difference=difference,
        bound=bound,
        effect=case.effect,
        greedy=int((logits.argmax(-1) == ours.argmax(-1)).sum()),
        seconds=result["seconds"],
        reason=None if is_equal else fault,
    )


def bound_difference(case: Case) -> float:
    """Return the largest difference of logits that rounding explains: 1e-5 of the largest one, and 1e-4."""
    return 1e-5 * float(np.abs(case.logits).max()) + 1e-4


def _normalize(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return logarithms of probabilities, fp32 (length, vocabulary)."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    normalized: NDArray[np.float32] = (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))).astype(np.float32)
    return normalized
