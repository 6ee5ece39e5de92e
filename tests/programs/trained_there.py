"""Adapters that other programs trained, or went on training: each is read here, and computes what it does there."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

import lora_kit as lk
from lora_kit.adapter.conversion.convert import convert
from tests.programs.cases import Case, compute_outputs, compute_with
from tests.programs.logit_checks import READERS

_STEPS: Final = 6
_ROWS: Final = [
    {"text": f"The {animal} in the {place} was {mood}, and nobody knew why."}
    for animal, place in (("fox", "garden"), ("crow", "tower"), ("hare", "field"), ("owl", "barn"))
    for mood in ("happy", "very old", "late again", "white as snow")
]


def train_with_mlx(cases: Sequence[Case], python: Path, folder: Path) -> list[Case]:
    """Train a LoRA and a DoRA with `mlx_lm.lora`; convert them, and return them with what they compute here."""
    data = _write_rows(folder / "data")
    made = []
    for case in cases:
        for kind in ("lora", "dora") if case.feature is None else ():
            out = folder / case.base / kind
            command = ["mlx_lm.lora", "--train", "--model", case.base_folder, "--data", data, "--fine-tune-type", kind]
            command += ["--iters", _STEPS, "--batch-size", 4, "--learning-rate", 1e-2, "--num-layers", -1]
            command += ["--val-batches", 1, "--adapter-path", out]
            _run([python.parent / str(command[0]), *command[1:]])
            made.append(_read(case, f"trained-{kind}", out, convert(out)))
    return made


def train_with_trl(cases: Sequence[Case], python: Path, folder: Path) -> list[Case]:
    """Let TRL's trainer go on from adapters of ours; return what it saved with what that computes here."""
    data = _write_rows(folder / "data") / "train.jsonl"
    made = []
    for case in cases:
        if case.adapter_folder is not None:
            out = folder / case.base / str(case.feature)
            _run([python, READERS / "train_with_trl.py", case.base_folder, case.adapter_folder, data, out, _STEPS])
            changed = _read(case, f"{case.feature}-trained-on", out, lk.Adapter.load(out))
            made.append(_measure_effect(changed, case))
    return made


def go_on_from_trl(cases: Sequence[Case], python: Path, folder: Path) -> list[Case]:
    """Let our trainer go on from what TRL's saved; return what ours saved with what that computes here."""
    data = _write_rows(folder / "data") / "train.jsonl"
    made = []
    for case in train_with_trl(cases, python, folder / "trl"):
        out = folder / case.base / str(case.feature)
        recipe = {"base": str(case.base_folder), "data": str(data), "from": str(case.adapter_folder), "out": str(out)}
        lk.train({**recipe, "train": {"max_steps": _STEPS, "learning_rate": 1e-2, "report_to": "none"}})
        changed = _read(case, f"{case.feature}-here", out, lk.Adapter.load(out))
        made.append(_measure_effect(changed, case))
    return made


def train_whole(cases: Sequence[Case], python: Path, folder: Path) -> list[Case]:
    """Train every weight of the bases here; return the models with what they compute as they are loaded here."""
    data = _write_rows(folder / "data") / "train.jsonl"
    made = []
    for case in cases:
        if case.adapter_folder is None:
            out = folder / case.base
            recipe = {"base": str(case.base_folder), "data": str(data), "method": "full", "out": str(out)}
            lk.train({**recipe, "train": {"max_steps": _STEPS, "learning_rate": 1e-3, "report_to": "none"}})
            logits = compute_outputs(lk.load_base(out, dtype="fp32", device="cpu").model, case.tokens)
            changed = dataclasses.replace(case, feature="every-weight", adapter_folder=out, logits=logits)
            made.append(_measure_effect(changed, case))
    return made


def _read(case: Case, feature: str, folder: Path, adapter: lk.Adapter) -> Case:
    """Return a case of an adapter that a program wrote into a folder, with what it computes as it is read here."""
    logits = compute_with(case, adapter)
    effect = float(np.abs(logits - case.logits).max())
    return dataclasses.replace(case, feature=feature, adapter_folder=folder, logits=logits, effect=effect)


def _measure_effect(case: Case, before: Case) -> Case:
    """Return a case whose effect is what going on has changed, so that a training that does nothing is seen."""
    return dataclasses.replace(case, effect=float(np.abs(case.logits - before.logits).max()))


def _write_rows(folder: Path) -> Path:
    folder.mkdir(parents=True)
    lines = "".join(f"{json.dumps(row)}\n" for row in _ROWS)
    for name in ("train", "valid"):
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def _run(command: Sequence[object]) -> None:
    """Run a command; raise RuntimeError with its last line where it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line and "%|" not in line]
        raise RuntimeError(f"{Path(str(command[0])).name} ended with {done.returncode}: {' '.join(lines[-1:])}")
