"""Converters that programs bring themselves: what they write of our adapters, and what they take beside ours."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import transformers

import lora_kit as lk
from lora_kit.models.silence import silence_libraries
from tests.programs.cases import Case
from tests.programs.costs import LORA_KIT, run_measured
from tests.programs.environments import find_llama_cpp
from tests.programs.outcomes import Outcome
from tests.programs.printed import put_on_path, read_version

_MODEL: Final = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
"""A Llama of 100 million weights: large enough that its conversion is seen beside the imports of Python."""
Commands = Callable[["Pair", Path], Mapping[str, Sequence[str | Path]]]
"""Returns our command as `ours` and the program's as `theirs`, given their files and the program's interpreter."""


def convert_with_llama_cpp(cases: Sequence[Case], python: Path, folder: Path) -> list[Case]:
    """Let llama.cpp's own converter write adapters of ours."""
    folder.mkdir(parents=True)
    converter = find_llama_cpp(python.parent.parent) / "convert_lora_to_gguf.py"
    made = []
    for case in cases:
        if case.adapter_folder is not None:
            out = folder / case.key
            out.mkdir(parents=True)
            command = [python, converter, "--base", case.base_folder, "--outtype", "f32"]
            command += ["--outfile", out / "adapter.gguf", case.adapter_folder]
            subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
            made.append(dataclasses.replace(case, adapter_folder=out))
    return made


@dataclass(frozen=True)
class Pair:
    """The files that commands of ours and of a program work on.

    Attributes:
        base: a model folder.
        adapter: of rank 16 on all linear layers.
        merged: the two in one.
        mlx: the adapter as mlx-lm reads it.
        out: folder for what is written.
    """

    base: Path
    adapter: Path
    merged: Path
    mlx: Path
    out: Path


def convert_adapter(pair: Pair, python: Path) -> Mapping[str, Sequence[str | Path]]:
    """The adapter as GGUF."""
    converter = find_llama_cpp(python.parent.parent) / "convert_lora_to_gguf.py"
    ours = [*LORA_KIT, "export", pair.adapter, "--target", "gguf", "--base", pair.base, "--out", pair.out / "ours"]
    theirs = [python, converter, "--base", pair.base, "--outtype", "f32", "--outfile", pair.out / "theirs.gguf"]
    return {"ours": ours, "theirs": [*theirs, pair.adapter]}


def fuse_with_mlx(pair: Pair, python: Path) -> Mapping[str, Sequence[str | Path]]:
    """A whole model: merged here and verified, fused by mlx-lm."""
    fuse = [python.parent / "mlx_lm.fuse", "--model", pair.base, "--adapter-path", pair.mlx]
    return {**_merge_here(pair), "theirs": [*fuse, "--save-path", pair.out / "theirs"]}


def convert_with_mlx(pair: Pair, python: Path) -> Mapping[str, Sequence[str | Path]]:
    """A whole model: merged here, then converted by mlx-lm."""
    convert = [python.parent / "mlx_lm.convert", "--hf-path", pair.merged, "--dtype", "float32"]
    return {**_merge_here(pair), "theirs": [*convert, "--mlx-path", pair.out / "theirs"]}


def convert_with_ctranslate2(pair: Pair, python: Path) -> Mapping[str, Sequence[str | Path]]:
    """A whole model: merged here, then converted by CTranslate2."""
    convert = [python.parent / "ct2-transformers-converter", "--model", pair.merged]
    return {**_merge_here(pair), "theirs": [*convert, "--output_dir", pair.out / "theirs"]}


def _merge_here(pair: Pair) -> dict[str, Sequence[str | Path]]:
    command = [*LORA_KIT, "merge", "--base", pair.base, "--adapter", pair.adapter, "--out", pair.out / "ours"]
    return {"ours": command}


@dataclass(frozen=True)
class CostCheck:
    """What a command of ours and one of a program take of processor time and memory.

    Attributes:
        environment: name in `environments.ENVIRONMENTS`.
        package: whose version is read.
        commands: by name.
    """

    environment: str
    package: str
    commands: Mapping[str, Commands]
    form: str = "converters"

    def run(self, cases: Sequence[Case], *, python: Path, folder: Path) -> tuple[str, list[Outcome]]:
        """Run every pair of commands, as `Check.run` says."""
        pair = _write_pair(cases[0].base_folder, folder)
        outcomes = []
        for name, commands in self.commands.items():
            here = dataclasses.replace(pair, out=folder / name)
            here.out.mkdir()
            both = commands(here, python)
            costs = {side: run_measured(command, variables=put_on_path(python)) for side, command in both.items()}
            outcomes.append(Outcome(name, "equal", ours=costs["ours"], theirs=costs["theirs"]))
            shutil.rmtree(here.out)
        shutil.rmtree(pair.base.parent)
        return f"{self.package} {read_version(python, self.package)}", outcomes


def _write_pair(tokenizer: Path, folder: Path) -> Pair:
    """Write a model of 100 million weights with some base's tokenizer, and an adapter in the forms that are needed."""
    files = folder / "files"
    pair = Pair(files / "base", files / "adapter", files / "merged", files / "mlx", folder)
    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**_MODEL, vocab_size=len(words))
    with silence_libraries():
        model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32)
        model.save_pretrained(pair.base)
        words.save_pretrained(pair.base)
    bank = lk.attach(model, lk.LoraConfig(r=16, init_lora_weights=False), name="made")
    bank.save("made", pair.adapter)
    bank.detach()
    lk.merge(pair.base, pair.adapter, pair.merged)
    lk.export(pair.adapter, "mlx", pair.mlx, base=pair.base)
    return pair
