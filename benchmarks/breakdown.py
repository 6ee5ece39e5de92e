"""Where does the rest go: what lies between the floor and lora_kit?

Trainings and forwards by torch's profiler, each beside the frozen base in turn: what every kind of operation takes more
than in the base, as a share of the base's time; medians over the rounds. The profiler itself makes operations slower,
so that the sums are above those of the tables without it. Python and autograd is what no operation accounts for. One
more adapter of 224 layers: CPU time by functions, from Python's profiler, scaled to a load without it. A merge: CPU
seconds of the thread that folds, and of those that hash, write and read back.
"""

from __future__ import annotations

import cProfile
import pstats
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

import lora_kit as lk
from benchmarks import inference, load_and_swap, merge, training_step
from benchmarks.harness import Effort, Row, in_own_process, table
from benchmarks.models import llama

CASES: Final = ("frozen base", "lora_kit")
PRODUCTS: Final = "products"
COPIES: Final = "copies and casts"
OTHERS: Final = "other operations"
PYTHON: Final = "Python and autograd"
PARTS: Final = (PRODUCTS, COPIES, OTHERS, PYTHON)
_OPERATIONS: Final = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mkldnn_linear", "addmv", "mv"), PRODUCTS),
    **dict.fromkeys(("copy_", "_to_copy", "to", "clone", "contiguous", "cat", "index_select", "gather"), COPIES),
}
"""Which part an operation belongs to; all others are `OTHERS`."""
_LOAD_PARTS: Final = {
    "read its files": ("open", "read"),
    "check its tensors": ("classify_tensors",),
    "which layers it covers": ("survey_adapter", "_find_mismatches"),
    "whether this is its base": ("_check_base",),
    "copy into the slots": ("fill",),
}
"""By the part of a load, the functions of lora_kit that do it."""
_LOADS: Final = 16


def profiled(run: Callable[[], Any]) -> dict[str, float]:
    """Return the milliseconds that each part of one call takes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        started = time.perf_counter()
        run()
        taken = 1e3 * (time.perf_counter() - started)
    parts = dict.fromkeys(PARTS, 0.0)
    for event in seen.key_averages():
        namespace, _, name = event.key.partition("::")
        if namespace == "aten":
            parts[_OPERATIONS.get(name, OTHERS)] += event.self_cpu_time_total / 1e3
    return parts | {PYTHON: taken - sum(parts.values())}


def compared(build: Callable[[], Mapping[str, Callable[[], Any]]], effort: Effort) -> dict[str, Any]:
    """Return the milliseconds of each part, by case."""
    cases = build()
    found: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
    for run in cases.values():
        run()
    started, number = time.perf_counter(), 0
    while number < effort.rounds or time.perf_counter() - started < effort.seconds / 2:
        for case in list(cases)[:: -1 if number % 2 else 1]:
            found[case].append(profiled(cases[case]))
        number += 1
    return {
        "ms": {
            case: {part: statistics.median(own[part] for own in all_) for part in PARTS} for case, all_ in found.items()
        }
    }


def training(dtype: str) -> dict[str, Callable[[], Any]]:
    setting = training_step.Setting(dtype)
    adapter = setting.adapter()
    return {case: training_step.build(case, setting, adapter).step for case in CASES}


def routed(batch: inference.Batch) -> dict[str, Callable[[], Any]]:
    cases = inference.build(batch)

    def run(case: str) -> None:
        cases.work[case](inference.TIMED[batch.work])
        cases.reroute()

    return {case: partial(run, case) for case in CASES}


def load(effort: Effort) -> dict[str, Any]:
    """Return the CPU milliseconds of a load, and of its parts."""
    with tempfile.TemporaryDirectory() as place:
        stored = load_and_swap.folders(Path(place), 2 * _LOADS)
        layers, width = load_and_swap.LAYERS, load_and_swap.WIDTH
        bank = lk.attach(llama(width=width, layers=layers), slots=len(stored), max_rank=load_and_swap.R)
        plain = [_cpu_ms(partial(bank.load, folder.name, folder)) for folder in stored[:_LOADS]]
        profile = cProfile.Profile(time.thread_time)
        for folder in stored[_LOADS:]:
            profile.runcall(bank.load, folder.name, folder)
    taken = statistics.median(plain[1:])  # the first one wraps the layers as well
    stats: Any = pstats.Stats(profile)
    cumulative = Counter[str]()
    for (file, _, name), (_, _, _, seconds, _) in stats.stats.items():
        if "lora_kit" in Path(file).parts:
            cumulative[name] += seconds
    scale = taken / cumulative["load"] if cumulative["load"] else 0.0
    shares = {part: scale * sum(cumulative[name] for name in names) for part, names in _LOAD_PARTS.items()}
    return {"cpu_ms": {"all": taken, **shares, "the rest": taken - sum(shares.values())}}


def _cpu_ms(run: Callable[[], Any]) -> float:
    started = time.process_time()
    run()
    return 1e3 * (time.process_time() - started)


def folded(effort: Effort) -> dict[str, Any]:
    """Return the CPU seconds of copying a model folder with its sha256, and of a merge by threads."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        merge.prepare(place, merge.SMALL)
        found = [in_own_process(cpu_of_merge, place) for _ in range(effort.rounds)]
    return {"cpu_s": {key: statistics.median(one[key] for one in found) for key in found[0]}}


def cpu_of_merge(place: Path) -> dict[str, float]:
    """Return CPU seconds. Run in a process of its own."""
    import transformers.models.llama.modeling_llama  # noqa: F401  # what a merge imports is not a part of it

    outs = [place / name for name in ("copy", "merged", "again")]
    for out in outs:
        shutil.rmtree(out, ignore_errors=True)
    merge.ours(place, outs[1])  # whatever is done once
    begin = time.process_time()
    merge.copied(place, outs[0])
    floor = time.process_time() - begin
    begin, own = time.process_time(), time.thread_time()
    merge.ours(place, outs[2])
    own, both = time.thread_time() - own, time.process_time() - begin
    return {"copy + sha256": floor, "fold, check and plan": own, "hash, write, read back and hash": both - own}


def rows() -> dict[str, Row]:
    batches = [
        inference.Batch("prefill", 8, 8),
        inference.Batch("decode", 8, 8),
        inference.Batch("decode", 32, 32),
    ]
    found = {
        f"training step, {dtype}": Row(
            partial(compared, partial(training, dtype)), "short" if dtype == "fp32" else "full"
        )
        for dtype in ("fp32", "bf16")
    }
    found |= {batch.label: Row(partial(compared, partial(routed, batch))) for batch in batches}
    return found | {"one more adapter, 224 layers": Row(load, "short"), "merge, 200 MB": Row(folded)}


def page(results: Mapping[str, Any]) -> str:
    lines = []
    for name, row in results.items():
        if "ms" in row:
            base, own = (row["ms"][case] for case in CASES)
            floor = sum(base.values())
            more = [100 * (own[part] - base[part]) / floor for part in PARTS]
            lines.append([name, f"{floor:,.1f} ms", *(f"{share:+.1f} %" for share in (*more, sum(more)))])
    sections = [table(["", "frozen base", *PARTS, "together"], lines)]
    for key, unit in (("cpu_ms", "ms"), ("cpu_s", "s")):
        for name, row in results.items():
            if key in row:
                sections += [f"{name[0].upper()}{name[1:]}:", _list_parts(row[key], unit)]
    return "\n\n".join(sections)


def _list_parts(parts: Mapping[str, float], unit: str) -> str:
    rows: Sequence[Sequence[str]] = [[part, f"{value:.2f} {unit}"] for part, value in parts.items()]
    return table(["part", "CPU time"], rows)
