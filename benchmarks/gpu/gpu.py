"""The CUDA path on one GPU: first whether it is right, then what it costs.

python -m benchmarks.gpu.gpu --out DIR                     # everything, within ten minutes
python -m benchmarks.gpu.gpu --out DIR --only training     # sections whose name holds this
python -m benchmarks.gpu.gpu --out DIR --rehearse          # the same script with tiny sizes, on a CPU

Every section has a time of its own and writes DIR/<section>.json as soon as it is done. A check that fails ends the
run with exit code 4; a section that fails says so in its file, the others go on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import logging
import os
import sys
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import lora_kit as lk
from benchmarks.gpu import sections
from benchmarks.gpu.bases import LLAMA_3_8B, TINY
from benchmarks.gpu.checks import all_checks
from benchmarks.gpu.sections import Deadline, Plan, Section
from benchmarks.harness import Effort


@dataclass(frozen=True)
class Part:
    """A section and the seconds it may take."""

    run: Section
    seconds: float


PARTS: Final = {
    "ceilings": Part(sections.ceilings, 10),
    "kernels": Part(sections.kernels, 90),
    "loss": Part(sections.loss, 20),
    "training-bf16": Part(sections.training_bf16, 90),
    "decoding": Part(sections.decoding, 130),
    "swapping": Part(sections.swapping, 90),
    "training-4bit": Part(sections.training_4bit, 90),
}
CHECKS: Final = "checks"

FULL: Final = Plan(
    device=torch.device("cuda"),
    shape=LLAMA_3_8B,
    layers=32,
    few=8,
    compiled=2,
    batch=4,
    length=1024,
    tokens=(1, 8, 64, 512, 4096),
    mixed=((8, 1), (64, 1), (8, 64)),
    decoding=((64, 1), (8, 8), (64, 8), (64, 64)),
    calls=100,
    effort=Effort(rounds=5, seconds=4),
)
REHEARSAL: Final = Plan(
    device=torch.device("cpu"),
    shape=TINY,
    layers=2,
    few=2,
    compiled=1,
    batch=2,
    length=16,
    tokens=(1, 20, 4096),
    mixed=((3, 1), (2, 20)),
    decoding=((4, 1), (4, 4)),
    calls=2,
    effort=Effort(rounds=2),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--only", default="", metavar="WORD", help=f"of {CHECKS}, {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=540, help="for everything (540)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        print("torch sees no CUDA device; --rehearse runs the script without one", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    plan = REHEARSAL if arguments.rehearse else FULL
    arguments.out.mkdir(parents=True, exist_ok=True)

    total = Deadline(arguments.seconds)
    if arguments.only in CHECKS and not checked(plan, arguments.out):
        return 4
    failed = False
    for name, part in PARTS.items():
        if arguments.only in name:
            failed |= not measured(name, part, plan, total, arguments.out)
    return int(failed)


def checked(plan: Plan, out: Path) -> bool:
    """Run every check; say and write which were wrong."""
    started, wrong = time.perf_counter(), {}
    names = all_checks()
    for name, check in names.items():
        try:
            check(plan.device)
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"
            print(f"WRONG  {name}: {wrong[name]}", flush=True)
            traceback.print_exc()
    seconds = time.perf_counter() - started
    print(f"checks: {len(names) - len(wrong)} of {len(names)} good, {seconds:.0f} s", flush=True)
    write(out, CHECKS, {"checks": list(names), "wrong": wrong, "seconds": seconds})
    return not wrong


def measured(name: str, part: Part, plan: Plan, total: Deadline, out: Path) -> bool:
    """Run a section and write what it found; False if it failed."""
    if total.left < 15:
        write(out, name, {"result": "out of time"})
        print(f"{name}: out of time", flush=True)
        return True
    deadline = Deadline(min(part.seconds, total.left))
    try:
        result: dict[str, Any] = {"result": part.run(plan, deadline)}
    except Exception:
        result = {"failed": traceback.format_exc()}
        print(result["failed"], flush=True)
    seconds = time.perf_counter() - deadline.started
    write(out, name, {**result, "seconds": seconds})
    print(f"{name}: {seconds:.0f} s", flush=True)
    if "result" in result:
        print(json.dumps(short(result["result"])), flush=True)
    gc.collect()
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()
    return "result" in result


def short(value: Any) -> Any:
    """A result to look at while it runs: ratios and rates, three digits."""
    if isinstance(value, dict):
        if "ratio" in value:
            kept = ("tokens per second", "peak bytes above the model", "median", "ratio")
            value = {key: value[key] for key in kept if key in value}
        return {key: short(each) for key, each in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def write(out: Path, name: str, result: dict[str, Any]) -> None:
    text = json.dumps({**result, **facts()}, indent=1, default=asdict)
    (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def facts() -> dict[str, Any]:
    """Versions and the device; no names of machines."""
    versions = {"lora_kit": lk.__version__}
    for library in ("torch", "triton", "transformers", "peft", "bitsandbytes"):
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "not installed"
    device: dict[str, Any] = {"name": "cpu"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = {"name": properties.name, "bytes": properties.total_memory, "cuda": torch.version.cuda}
    return {"versions": versions, "device": device}


if __name__ == "__main__":
    sys.exit(main())
