"""What does it cost to merge an adapter into a model folder?

Llamas with random weights in bf16: 200 MB in one file, and 2 GB in five; an adapter of rank 16 on all linears. Every
merge is a process of its own; timed is the merge without the imports. Memory is the most anonymous memory in use
above what the imports take: pages of files that are mapped are none. The floor is to copy the folder to disk and take
the sha256 of what was copied. PEFT loads the model, merges, and saves it; it does not check what it wrote. lora_kit
writes, reads back by sha256, and compares samples with a second computation. The results are compared weight by weight;
lora_kit's must have the bits of a sum in fp32 that is rounded once.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

import lora_kit as lk
from benchmarks.harness import Effort, Row, in_own_process, ratios, seconds_of, table, timings
from benchmarks.models import adapters, llama

CASES: Final = ("copy + sync + sha256", "lora_kit", "peft")
R: Final = 16
_TICK: Final = 2e-3
"""Seconds between two looks at the memory in use."""


@dataclass(frozen=True)
class Size:
    """A base to merge into.

    Attributes:
        shard: the most one of its files holds, as transformers takes it.
        rounds: at most; 0 for as many as are asked for.
    """

    width: int
    layers: int
    shard: str
    rounds: int = 0


SMALL: Final = Size(768, 14, "1GB")
LARGE: Final = Size(2048, 20, "450MB", rounds=3)


def prepare(place: Path, size: Size) -> None:
    """A base with kit-base's tokenizer, and an adapter for it."""
    from lora_kit.models.loading import load_base

    model = llama(width=size.width, layers=size.layers, dtype="bf16")
    model.save_pretrained(place / "base", max_shard_size=size.shard)
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
    for module in ("lora_kit.merging", "transformers.models.llama.modeling_llama", "peft"):
        importlib.import_module(module)
    out = place / case
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    with anonymous_peak() as peak:
        seconds = seconds_of(partial(WAYS[case], place, out))
    return seconds, peak[0]


@contextmanager
def anonymous_peak() -> Iterator[list[int]]:
    """The most anonymous memory of the process inside the block, in bytes above what there was before it."""
    before, done, peak = anonymous(), threading.Event(), [0]

    def watch() -> None:
        while not done.wait(_TICK):
            peak[0] = max(peak[0], anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def anonymous() -> int:
    """Bytes of anonymous memory in use."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def check(place: Path) -> None:
    """Both merges hold the same weights, to one rounding to bf16; lora_kit's the very bits of a sum in fp32."""
    adapter = lk.Adapter.load(place / "adapter")
    base, own, other = (_tensors(place / name) for name in ("base", "lora_kit", "peft"))
    if not base.keys() == own.keys() == other.keys():
        raise ValueError(f"the merges hold different tensors: {own.keys() ^ other.keys()}")
    for key, tensor in base.items():
        torch.testing.assert_close(own[key], other[key], rtol=2**-7, atol=1e-6)
        wanted, path = tensor, key.removesuffix(".weight")
        if path in adapter.pairs():
            pair = adapter.pairs()[path]
            delta = (pair.b @ pair.a) * adapter.config.scaling_of(path)
            wanted = (tensor.float() + delta).to(tensor.dtype)
            if torch.equal(wanted, tensor):
                raise ValueError(f"the merge changed nothing in {key}")
        if not torch.equal(own[key], wanted):
            raise ValueError(f"{key} has other bits than a sum in fp32")


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def merges(effort: Effort, *, size: Size) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {case: [] for case in effort.of(CASES)}
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        in_own_process(prepare, place, size)
        for number in range(min(effort.rounds, size.rounds or effort.rounds)):
            for case in list(seconds)[:: -1 if number % 2 else 1]:
                taken, peak = in_own_process(once, case, place)
                seconds[case].append(taken)
                peaks[case] = max(peak, peaks.get(case, 0))
        if len(seconds) == len(CASES):
            in_own_process(check, place)
        allowed = _allowed(place)
    return {"timings": timings(seconds), "bytes": peaks, "allowed": allowed}


def _allowed(place: Path) -> int:
    """What a merge may take: its largest tensor one and a half times, the adapter, and 64 MB."""
    largest = max(tensor.nbytes for tensor in _tensors(place / "base").values())
    return int(1.5 * largest) + lk.Adapter.load(place / "adapter").nbytes + 64 * 2**20


def rows() -> dict[str, Row]:
    return {
        "merge, 200 MB": Row(partial(merges, size=SMALL), "short"),
        "merge, 2 GB in five files": Row(partial(merges, size=LARGE), "full", aim=1.5),
    }


def page(results: Mapping[str, Any]) -> str:
    memory = [
        [name, *(_megabytes(row["bytes"].get(case)) for case in CASES), _megabytes(row.get("allowed"))]
        for name, row in results.items()
    ]
    return "\n\n".join(
        [
            "Time over that of the copy: median over the rounds, and its quartiles.",
            ratios({name: row["timings"] for name, row in results.items()}, CASES),
            "The most anonymous memory above the imports; allowed are the largest tensor one and a half times, the "
            "adapter, and 64 MB:",
            table(["", *CASES, "allowed"], memory),
        ]
    )


def _megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:,.0f} MB"
