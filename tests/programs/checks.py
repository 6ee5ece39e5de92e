"""Run a program's reader on files of every case, and compare its logits with our own."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

import lora_kit as lk
from lora_kit.errors import ExportError, MergeError
from tests.programs.cases import LEAST_EFFECT, Case

READERS: Final = Path(__file__).parent / "readers"
_MINUTES: Final = 30

Write = Callable[[Case, Path], Path]
"""Writes what a program reads of a case below a folder, and returns it; raises ExportError or MergeError."""


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


def write_merged(case: Case, folder: Path) -> Path:
    """Merge an adapter; what changes one of two tied tensors is written apart."""
    assert case.adapter_folder is not None
    lk.merge(case.base_folder, case.adapter_folder, folder, allow=["untie"], replace=True)
    return folder


@dataclass(frozen=True)
class Check:
    """A program, and what it is given.

    Attributes:
        environment: name in `environments.ENVIRONMENTS`; None for the one that runs this.
        reader: script of `readers/`.
        form: what it reads: `saved`, `merged` or a target of `lk.export`.
        write: writes that form.
        bases: names of bases; None for all.
        features: kinds of adapters; None for all.
        wide_bounds: by base, the largest difference of logits that is right where the program computes something of the
            base less precisely.
        known_faults: by feature, what the program is known to do wrong.
    """

    environment: str | None
    reader: str
    form: str
    write: Write
    bases: Sequence[str] | None = None
    features: Sequence[str] | None = None
    wide_bounds: Mapping[str, float] = field(default_factory=dict)
    known_faults: Mapping[str, str] = field(default_factory=dict)

    def takes(self, case: Case) -> bool:
        fits_base = self.bases is None or case.base in self.bases
        return fits_base and (case.feature is None or self.features is None or case.feature in self.features)


@dataclass(frozen=True)
class Outcome:
    """What a program made of a case.

    Attributes:
        key: `base/feature`.
        verdict: `equal`; `rejected` by us, before anything was written; `known` for a fault of the program that is
            documented; `wrong`; `failed`, the program gave no logits.
        difference: the largest one between logits.
        bound: of the difference.
        effect: the largest change of a logit by the adapter.
        greedy: how many of the most probable tokens are the same.
        seconds: that the program took.
        reason: why it was rejected or failed.
    """

    key: str
    verdict: str
    difference: float | None = None
    bound: float | None = None
    effect: float | None = None
    greedy: int | None = None
    seconds: float | None = None
    reason: str | None = None

    @property
    def is_right(self) -> bool:
        return self.verdict in ("equal", "rejected", "known")


def run_check(check: Check, cases: Sequence[Case], *, python: Path, folder: Path) -> tuple[str, list[Outcome]]:
    """Run a program on the cases that it takes; return its version and what came of each.

    Args:
        python: interpreter of the program's environment.
        folder: for the files of this check; emptied first.

    Raises:
        RuntimeError: the program did not run at all.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    jobs, outcomes = _write_jobs(check, [case for case in cases if check.takes(case)], folder)
    version, results = _run_reader(check, [job for job, _ in jobs], python=python, folder=folder)
    for job, case in jobs:
        outcomes.append(_judge(check, case, results[job["key"]], Path(job["logits"])))
    return version, outcomes


def _write_jobs(
    check: Check, cases: Sequence[Case], folder: Path
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
            job["base" if check.form == "merged" else "adapter"] = str(written)
        jobs.append((job, case))
    return jobs, rejected


def _run_reader(
    check: Check, jobs: Sequence[Mapping[str, Any]], *, python: Path, folder: Path
) -> tuple[str, dict[str, dict[str, Any]]]:
    questions, answers = folder / "jobs.json", folder / "results.json"
    questions.write_text(json.dumps(jobs), encoding="utf-8")
    command = [python, READERS / f"{check.reader}.py", questions, answers]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60 * _MINUTES)
    if not answers.is_file():
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise RuntimeError(f"{check.reader} ended with {done.returncode}: {' '.join(last)}")
    written = json.loads(answers.read_text(encoding="utf-8"))
    return written["version"], {result["key"]: result for result in written["results"]}


def _judge(check: Check, case: Case, result: Mapping[str, Any], file: Path) -> Outcome:
    fault = check.known_faults.get(case.feature or "")
    if result["error"] is not None:
        return Outcome(case.key, "known" if fault else "failed", reason=fault or result["error"])
    logits = np.load(file)[:, : case.logits.shape[1]]
    difference = float(np.abs(logits - case.logits).max())
    bound = check.wide_bounds.get(case.base, 1e-5 * float(np.abs(case.logits).max()) + 1e-4)
    is_equal = np.isfinite(difference) and difference <= bound
    if case.feature is not None and case.effect < LEAST_EFFECT:
        raise RuntimeError(f"{case.key}: the adapter changes logits by {case.effect:.2g}, too little to be seen")
    return Outcome(
        case.key,
        "equal" if is_equal else "known" if fault else "wrong",
        difference=difference,
        bound=bound,
        effect=case.effect,
        greedy=int((logits.argmax(-1) == case.logits.argmax(-1)).sum()),
        seconds=result["seconds"],
        reason=None if is_equal else fault,
    )


_GEMMAS: Final = {"gemma": 1e-2, "gemma2": 1e-2, "gemma3": 1e-2}
_DORA_MIDDLE: Final = "transformers 5.23 initializes a DoRA's magnitudes anew (its names end in `.default`)"
_NO_TOKENS: Final = {"tokens": "`trainable_token_indices` came with PEFT 0.15"}
_PLAIN_BASES: Final = ("kit-base", "llama", "mistral", "qwen2", "qwen3")
CHECKS: Final = {
    "peft": (
        Check(None, "read_with_peft", "saved", write_saved),
        Check(None, "read_with_peft", "peft", write_export("peft")),
        Check(None, "read_with_peft", "vllm", write_export("vllm")),
    ),
    "peft-0.10": (Check("peft-0.10", "read_with_peft", "vllm", write_export("vllm"), bases=_PLAIN_BASES),),
    "peft-0.13": (
        Check("peft-0.13", "read_with_peft", "saved", write_saved, bases=_PLAIN_BASES, known_faults=_NO_TOKENS),
    ),
    "peft-0.15": (Check("peft-0.15", "read_with_peft", "saved", write_saved, bases=_PLAIN_BASES),),
    "peft-0.17": (Check("peft-0.17", "read_with_peft", "saved", write_saved, bases=_PLAIN_BASES),),
    "transformers": (
        Check(None, "read_with_transformers", "merged", write_merged),
        Check(None, "read_with_transformers", "saved", write_saved, known_faults={"dora": _DORA_MIDDLE}),
    ),
    "transformers-4.57": (Check("peft-0.17", "read_with_transformers", "merged", write_merged, bases=_PLAIN_BASES),),
    "llama.cpp": (
        Check("llama.cpp", "read_with_llama_cpp", "gguf", write_export("gguf"), wide_bounds=_GEMMAS),
        Check("llama.cpp", "read_with_llama_cpp", "merged", write_merged, bases=("llama", "qwen2")),
    ),
    "mlx": (
        Check("mlx", "read_with_mlx", "mlx", write_export("mlx"), wide_bounds=_GEMMAS),
        Check("mlx", "read_with_mlx", "merged", write_merged, bases=_PLAIN_BASES),
    ),
    "ctranslate2": (Check("ctranslate2", "read_with_ctranslate2", "merged", write_merged, bases=("llama", "qwen2")),),
    "onnx": (
        Check("onnx", "read_with_onnx", "merged", write_merged, bases=("llama",), features=("plain", "dora", "head")),
    ),
}
"""By program."""


def iterate_checks(only: Sequence[str]) -> Iterator[tuple[str, Check]]:
    """Yield (program, check); all of them where none are named."""
    for program, checks in CHECKS.items():
        if not only or program in only:
            yield from ((program, check) for check in checks)
