"""What does it cost to swap, to load one more adapter, and to start?

Swaps and loads: a Llama of 32 layers with all seven linears adapted (224 layers), narrow, since the width does not
matter there. Every adapter is another folder; lora_kit and PEFT load the n-th one in turn, and must then give the same
logits. Loading from disk: an adapter of 40 MB into a Llama of 8 layers of width 1024, from files that were just read;
the floor is to read them and take their sha256. Starting: whole processes; the floor is one that imports torch; and
imports in a process that has torch already.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

import lora_kit as lk
from benchmarks.harness import Case, Effort, Row, quartiles, ratios, seconds_of, table
from benchmarks.models import adapters, llama, token_ids

LAYERS, WIDTH, R = 32, 64, 8
CASES: Final = ("lora_kit", "peft")
SWAPS: Final = {"lora_kit": 1000, "peft": 30}
STARTS: Final = {"import torch": ["-c", "import torch"], "lora-kit --help": ["-m", "lora_kit", "--help"]}
IMPORTS: Final = {
    "lora_kit": "import lora_kit",
    "lora_kit.attach, lora_kit.Adapter": "import lora_kit; lora_kit.attach, lora_kit.Adapter",
    "peft": "import peft",
}


def folders(place: Path, count: int) -> list[Path]:
    """As many adapters, each in a folder of its own."""
    made = [place / f"a{number}" for number in range(count)]
    for value, folder in zip(adapters(llama(width=WIDTH, layers=LAYERS), [R] * count), made, strict=True):
        value.save(folder)
    return made


def in_peft(folder: Path, *, model: Any) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder, adapter_name=folder.name)


def loads(count: int, _effort: Effort) -> dict[str, Any]:
    """Load adapters one after the other; swap between the first and the last where 2, 16 and 64 are loaded.

    Returns:
        load_ms: of each adapter, from the first to the last, by case. swap_us: quartiles, by case and number of
        adapters loaded.
    """
    with tempfile.TemporaryDirectory() as place:
        stored = folders(Path(place), count)
        bank = lk.attach(llama(width=WIDTH, layers=LAYERS), slots=count, max_rank=R)
        wrapped = in_peft(stored[0], model=llama(width=WIDTH, layers=LAYERS))
        wrapped.delete_adapter("a0")
        load: dict[str, Callable[[Path], Any]] = {
            "lora_kit": lambda folder: bank.load(folder.name, folder),
            "peft": lambda folder: wrapped.load_adapter(folder, adapter_name=folder.name),
        }
        use: dict[str, Callable[[str], Any]] = {"lora_kit": bank.use, "peft": wrapped.set_adapter}
        load_ms: dict[str, list[float]] = {case: [] for case in CASES}
        swap_us: dict[str, dict[int, Sequence[float]]] = {case: {} for case in CASES}
        for number, folder in enumerate(stored, start=1):
            for case in CASES:
                load_ms[case].append(seconds_of(partial(load[case], folder)) * 1e3)
            if number in (2, 16, 64):
                check(bank, wrapped, folder.name)
                for case in CASES:
                    swap_us[case][number] = swaps(use[case], ("a0", folder.name), SWAPS[case])
    return {"load_ms": load_ms, "swap_us": swap_us}


def check(bank: lk.AdapterBank, wrapped: Any, name: str) -> None:
    """After a swap both give the same logits."""
    bank.use(name)
    wrapped.set_adapter(name)
    with torch.inference_mode():
        own, other = (model(input_ids=token_ids(1, 8)).logits for model in (bank.model, wrapped.eval()))
    torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-3)


def swaps(use: Callable[[str], Any], names: tuple[str, str], count: int) -> tuple[float, float, float]:
    """Quartiles of a swap in microseconds. No swap is a repetition."""
    return quartiles([seconds_of(partial(use, names[number % 2])) * 1e6 for number in range(count)])


def from_disk(effort: Effort) -> dict[str, Any]:
    model = llama(width=1024)
    value = adapters(model, [64])[0]
    bank = lk.attach(llama(width=1024), slots=1, max_rank=64)
    with tempfile.TemporaryDirectory() as place:
        folder, other = Path(place) / "a", Path(place) / "b"
        value.save(folder)
        adapters(model, [8])[0].save(other)
        wrapped = in_peft(other, model=model)
        cases: dict[str, Callable[[], Any]] = {
            "read + sha256": partial(digests, folder),
            "Adapter.load": partial(lk.Adapter.load, folder),
            "bank.load": Case(partial(bank.load, "a", folder), after=partial(bank.unload, "a")),
            "peft": Case(
                partial(wrapped.load_adapter, folder, adapter_name="a"), after=partial(wrapped.delete_adapter, "a")
            ),
        }
        return {"timings": effort.compare(cases)}


def digests(folder: Path) -> list[str]:
    """Read every file of a folder and take its sha256."""
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())]


def starts(effort: Effort) -> dict[str, Any]:
    """Whole processes, and imports in a process that has torch already."""
    times = {name: [import_ms(statement) for _ in range(effort.rounds)] for name, statement in IMPORTS.items()}
    return {
        "timings": effort.compare({name: partial(python, arguments) for name, arguments in STARTS.items()}),
        "import_ms": {name: quartiles(values) for name, values in times.items()},
    }


def python(arguments: Sequence[str]) -> str:
    """What a Python process prints."""
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout


def import_ms(statement: str) -> float:
    timed = f"import time, torch; start = time.perf_counter(); {statement}; print((time.perf_counter() - start) * 1e3)"
    return float(python(["-c", timed]).splitlines()[-1])


def rows() -> dict[str, Row]:
    return {
        "load and swap, 16 adapters": Row(partial(loads, 16), "short only"),
        "load and swap, 64 adapters": Row(partial(loads, 64)),
        "load from disk, 40 MB": Row(from_disk, "short"),
        "start": Row(starts, "short"),
    }


def page(results: Mapping[str, Any]) -> str:
    parts = []
    for row in results.values():
        if "swap_us" in row:
            parts += [
                "One swap (median, and quartiles):",
                swapping(row["swap_us"]),
                "Loading:",
                loading(row["load_ms"]),
            ]
    for name in ("load from disk, 40 MB", "start"):
        if name in results:
            timings = results[name]["timings"]
            parts += [f"{name[0].upper()}{name[1:]}:", ratios({name: timings}, list(timings))]
        if name == "start" and name in results:
            parts += ["Imports beyond torch:", importing(results[name]["import_ms"])]
    return "\n\n".join(parts)


def swapping(swap_us: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    counts = list(swap_us["lora_kit"])
    lines = [
        [case, *(f"{middle:,.1f} µs ({low:,.1f}–{high:,.1f})" for low, middle, high in (row[n] for n in counts))]
        for case, row in swap_us.items()
    ]
    return table(["adapters loaded", *counts], lines)


def importing(import_ms: Mapping[str, Sequence[float]]) -> str:
    cells = [[name, f"{middle:,.0f} ms ({low:,.0f}–{high:,.0f})"] for name, (low, middle, high) in import_ms.items()]
    return table(["import", "time"], cells)


def loading(load_ms: Mapping[str, Sequence[float]]) -> str:
    """The first loads, and medians of later ones, eight at a time."""
    last = len(load_ms["lora_kit"])
    groups = [(1, 1), (2, 2), *((first, min(first + 7, last)) for first in range(3, last + 1, 8))]
    lines = [
        [case, *(f"{quartiles(values[first - 1 : until])[1]:,.0f} ms" for first, until in groups)]
        for case, values in load_ms.items()
    ]
    return table(["adapter", *(f"{a}–{b}" if b > a else str(a) for a, b in groups)], lines)
