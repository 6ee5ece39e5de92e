"""What does it cost to merge an adapter into a model folder?

A Llama of 100 million weights in bf16 (200 MB) and an adapter of rank 16 on all its linears. Every merge is a process
of its own; timed is the merge without the imports, and its peak memory is above what the imports take. The floor is to
copy the folder to disk and take the sha256 of what was copied. PEFT loads the model, merges, and saves it; it does not
check what it wrote. The two results are compared, weight by weight.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

import lora_kit as lk
from benchmarks.harness import Effort, Row, in_own_process, peak_bytes, ratios, seconds_of, table, timings
from benchmarks.models import adapters, llama

CASES: Final = ("copy + sync + sha256", "lora_kit", "peft")
WIDTH, LAYERS, R = 768, 14, 16


def prepare(place: Path) -> None:
    """A base with kit-base's tokenizer, and an adapter for it."""
    from lora_kit.models import load_base

    model = llama(width=WIDTH, layers=LAYERS, dtype="bf16")
    model.save_pretrained(place / "base")
    load_base("kit-base").tokenizer.save_pretrained(place / "base")
    adapters(model, [R])[0].save(place / "adapter")


def copied(place: Path, out: Path) -> None:
    """Every file of the base to disk, and the sha256 of what was written."""
    shutil.copytree(place / "base", out)
    for file in out.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            hashlib.file_digest(opened, "sha256")


def ours(place: Path, out: Path) -> None:
    lk.merge(place / "base", place / "adapter", out)


def theirs(place: Path, out: Path) -> None:
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base", dtype="auto")
    merged: Any = peft.PeftModel.from_pretrained(base, place / "adapter")
    merged.merge_and_unload().save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(place / "base").save_pretrained(out)


WAYS: Final[dict[str, Callable[[Path, Path], None]]] = dict(zip(CASES, (copied, ours, theirs), strict=True))


def once(case: str, place: Path) -> tuple[float, int]:
    """Seconds and peak bytes of one merge. Run in a process of its own."""
    for module in ("lora_kit.merge", "transformers.models.llama.modeling_llama", "peft"):
        importlib.import_module(module)
    out = place / case
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    seconds = []
    peak = peak_bytes(lambda: seconds.append(seconds_of(partial(WAYS[case], place, out))))
    return seconds[0], peak


def check(place: Path) -> None:
    """Both merges hold the same weights, to one rounding to bf16, and not the base's."""
    from safetensors.torch import load_file

    base, own, other = (load_file(place / name / "model.safetensors") for name in ("base", "lora_kit", "peft"))
    if own.keys() != other.keys():
        raise ValueError(f"the merges hold different tensors: {own.keys() ^ other.keys()}")
    for key in own:
        torch.testing.assert_close(own[key], other[key], rtol=2**-7, atol=1e-6)
    if not any(not torch.equal(own[key], base[key]) for key in own):
        raise ValueError("the merge changed nothing")


def merges(effort: Effort) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {case: [] for case in effort.of(CASES)}
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        in_own_process(prepare, place)
        for number in range(effort.rounds):
            for case in list(seconds)[:: -1 if number % 2 else 1]:
                taken, peak = in_own_process(once, case, place)
                seconds[case].append(taken)
                peaks[case] = max(peak, peaks.get(case, 0))
        if len(seconds) == len(CASES):
            check(place)
    return {"timings": timings(seconds), "bytes": peaks}


def rows() -> dict[str, Row]:
    return {"merge, 200 MB": Row(merges, "short", aim=1.5)}


def page(results: Mapping[str, Any]) -> str:
    name, row = next(iter(results.items()))
    memory = table(["", *CASES], [[name, *(f"{row['bytes'][case] / 1e6:,.0f} MB" for case in CASES)]])
    return "\n\n".join(
        [
            "Time over that of the copy: median over the rounds, and its quartiles.",
            ratios({name: row["timings"]}, CASES),
            "Peak memory above the imports:",
            memory,
        ]
    )
