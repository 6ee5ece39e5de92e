"""The commands that exports print, run as they are printed, where the program is there."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from unittest.mock import patch

import torch

import lora_kit as lk
from lora_kit.exporters.whole_model import CONVERTER_VARIABLE
from tests.programs.cases import Case
from tests.programs.environments import find_llama_cpp
from tests.programs.outcomes import Outcome
from tests.programs.printed import put_on_path, read_block, read_version

_PROMPT: Final = "..."
"""The one of the printed command."""
_MLX_TOKENS: Final = 100
"""What `mlx_lm.generate` writes where nothing is said."""
_RULE: Final = "=========="


@dataclass(frozen=True)
class MlxCommandCheck:
    """`mlx_lm.generate`, as the README of an export for mlx-lm has it: the text must be ours.

    Attributes:
        base: name of the base.
        features: kinds of adapters.
    """

    base: str
    features: Sequence[str]
    environment: str = "mlx"
    form: str = "printed command"

    def run(self, cases: Sequence[Case], *, python: Path, folder: Path) -> tuple[str, list[Outcome]]:
        """Run the command of each adapter, as `Check.run` says."""
        taken = [case for case in cases if case.base == self.base and case.feature in self.features]
        outcomes = [_generate_with_mlx(case, python, folder / str(case.feature)) for case in taken]
        return f"mlx-lm {read_version(python, 'mlx-lm')}", outcomes


def _generate_with_mlx(case: Case, python: Path, folder: Path) -> Outcome:
    assert case.adapter_folder is not None
    with chdir(folder.parent):  # a README names folders from where it was written
        lk.export(case.adapter_folder, "mlx", folder, base=case.base_folder)
    written = _run_printed(read_block(folder, "sh"), python, folder.parent)
    theirs = written.split(f"{_RULE}\n")[1].strip()  # it prints no space at the beginning
    ours, before = (_generate_here(case, adapter).strip() for adapter in (lk.Adapter.load(case.adapter_folder), None))
    if ours == before:
        raise RuntimeError(f"{case.key} changes nothing of the text, so that it would not be missed")
    reason = None if theirs == ours else f"mlx-lm writes {theirs[:80]!r}, not {ours[:80]!r}"
    return Outcome(case.key, "wrong" if reason else "equal", reason=reason, requests=1, wrong_answers=int(bool(reason)))


@torch.no_grad()
def _generate_here(case: Case, adapter: lk.Adapter | None) -> str:
    """Return what our bank writes after the prompt of the printed command."""
    base = lk.load_base(case.base_folder, dtype="fp32", device="cpu")
    bank = lk.attach(base.model, slots=1, max_rank=64)
    if adapter is not None:
        bank.load("made", adapter)
        bank.use("made")
    batch = base.tokenizer([_PROMPT], return_tensors="pt")
    written = base.model.generate(**batch, max_new_tokens=_MLX_TOKENS, do_sample=False)
    text: str = base.tokenizer.decode(written[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def convert_as_printed(cases: Sequence[Case], python: Path, folder: Path) -> list[Case]:
    """Export whole models without llama.cpp here, and run the command that converts them, the first of the README."""
    folder.mkdir(parents=True)
    _prepare_llama_cpp(python, folder / "llama.cpp")
    made = []
    for case in cases:
        if case.adapter_folder is not None:
            out = folder / case.key
            with chdir(folder):
                lk.export(case.adapter_folder, "gguf-model", out, base=case.base_folder, allow=["untie"])
            _run_printed(read_block(out, "sh").splitlines()[0], python, folder)
            made.append(dataclasses.replace(case, adapter_folder=out))
    return made


def convert_in_export(cases: Sequence[Case], python: Path, folder: Path) -> list[Case]:
    """Export whole models with llama.cpp here, so that the export runs its converter.

    It runs with the Python of llama.cpp's environment, which has what the converter needs.
    """
    folder.mkdir(parents=True)
    _prepare_llama_cpp(python, folder / "llama.cpp")
    made = []
    variables = {CONVERTER_VARIABLE: str(folder / "llama.cpp")}
    with patch.dict(os.environ, variables), patch.object(sys, "executable", str(python)):
        for case in cases:
            if case.adapter_folder is not None:
                out = folder / case.key
                lk.export(case.adapter_folder, "ollama-model", out, base=case.base_folder, allow=["untie"])
                made.append(dataclasses.replace(case, adapter_folder=out))
    return made


def _prepare_llama_cpp(python: Path, folder: Path) -> None:
    """Copy llama.cpp's converter, changed as the README of an export of kit-base says."""
    shutil.copytree(find_llama_cpp(python.parent.parent), folder)
    file = folder / "conversion" / "base.py"
    head = "    def get_vocab_base_pre(self, tokenizer) -> str:\n"
    text = file.read_text(encoding="utf-8")
    if text.count(head) != 1:
        raise RuntimeError(f"{file} has no get_vocab_base_pre to change")
    file.write_text(text.replace(head, f'{head}        return "gpt-2"\n'), encoding="utf-8")


def _run_printed(command: str, python: Path, folder: Path) -> str:
    """Run a command of a README in a folder with an environment's programs on the path, and return what it prints.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(
        ["sh", "-c", command], cwd=folder, env=dict(put_on_path(python)), capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise RuntimeError(f"`{command.strip()}` ended with {done.returncode}: {' '.join(last)}")
    return done.stdout
