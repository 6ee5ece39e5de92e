"""What is here and what works here: versions, devices, and small real trials of the things the kit stands on."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

import torch

from lora_kit.bank.attach import attach
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import LoraKitError, VerificationError
from lora_kit.io.text import escape_text
from lora_kit.models.loading import load_base
from lora_kit.models.locate import KIT_BASE
from lora_kit.version import __version__

LIBRARIES: Final = (
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "triton",
    "cyclopts",
    "rich",
)
_GB: Final = 1e9


class NotHereError(LoraKitError):
    """A check does not apply to this machine."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One trial.

    Attributes:
        name: what was tried.
        state: `good`; `failed`; or `not here`, for what this machine does not have and need not have.
        seconds: how long it took.
        note: what was found, or why it failed.
    """

    name: str
    state: Literal["good", "failed", "not here"]
    seconds: float
    note: str

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "state": self.state, "seconds": round(self.seconds, 4), "note": self.note}


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What was found.

    Attributes:
        facts: names and values: versions, processor, memory, devices.
        checks: the trials, in the order they were made.
    """

    facts: Mapping[str, str]
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(check.name for check in self.checks if check.state == "failed")

    def to_json(self) -> dict[str, Any]:
        return {"facts": dict(self.facts), "checks": [check.to_json() for check in self.checks]}


def examine(checks: Mapping[str, Callable[[], str]] | None = None) -> Examination:
    """Look at the machine and try everything once; a trial that fails is a result, never an exception.

    Args:
        checks: trials by name, each returning a note or raising; `CHECKS` by default.
    """
    trials = CHECKS if checks is None else checks
    return Examination(facts=collect_facts(), checks=tuple(_run_check(name, trial) for name, trial in trials.items()))


def collect_facts() -> dict[str, str]:
    """Versions, processor, memory and devices."""
    found = {
        "lora_kit": __version__,
        "python": f"{platform.python_version()} ({platform.system()} {platform.release()})",
    }
    found |= {name: _installed_version_of(name) for name in LIBRARIES}
    found["processor"] = f"{_describe_processor()}, {_count_cores()} cores, torch uses {torch.get_num_threads()}"
    found["memory"] = _describe_memory()
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    for index, device in enumerate(devices):
        capability = f"compute {device.major}.{device.minor}"
        found[f"cuda:{index}"] = (
            f"{device.name}, {device.total_memory / _GB:.1f} GB, {capability}, CUDA {torch.version.cuda}"
        )
    return found if devices else {**found, "cuda": "no device"}


def _run_check(name: str, trial: Callable[[], str]) -> Check:
    started = time.perf_counter()
    state: Literal["good", "failed", "not here"] = "good"
    try:
        with _silence_warnings():
            note = trial()
    except NotHereError as reason:
        state, note = "not here", reason.message
    except Exception as error:  # whatever it is, it is what the doctor was asked to find
        lines = str(error).strip().splitlines() or ["no message"]
        state, note = "failed", f"{type(error).__name__}: {lines[0]}"
    return Check(name=name, state=state, seconds=time.perf_counter() - started, note=escape_text(note))


def _try_training_step(dtype: torch.dtype) -> str:
    """One step of an adapter on a tiny decoder: the adapter must move, and nothing else."""
    import transformers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: torch.nn.Module = transformers.LlamaForCausalLM(config)
        model.to(device, dtype)
        bank = attach(model, LoraConfig(r=4, lora_alpha=8))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    optimizer = torch.optim.AdamW(bank.parameters("default"), lr=1e-2)
    ids = torch.arange(64, device=device).view(2, 32)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    moved = [
        name for name, tensor in model.state_dict().items() if name in base and not torch.equal(tensor, base[name])
    ]
    if moved or not losses[-1] < losses[0]:
        raise VerificationError(f"loss {losses[0]:.4f} to {losses[-1]:.4f}; base tensors changed: {len(moved)}")
    return f"{device.type}: loss {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps"


def _try_compile() -> str:
    def product(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ x.T) + 1

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.linspace(-1, 1, 64, device=device).view(8, 8)
    try:
        compiled = torch.compile(product)(x)
    except Exception as error:
        if "compiler" in str(error).lower() and device == "cpu":
            raise NotHereError(
                "no C++ compiler, which torch.compile needs on a CPU; everything else works without"
            ) from None
        raise
    difference = float((compiled - product(x)).abs().max())
    if difference > 1e-5:
        raise VerificationError(f"compiled and plain differ by {difference:.3g}")
    return f"{device}: equal to plain torch"


def _try_four_bit() -> str:
    import bitsandbytes.functional as bnb

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.linspace(-1, 1, 64 * 64, device=device).view(64, 64)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
    error = float((bnb.dequantize_4bit(packed, state) - weight).abs().max())
    if error > 0.25:
        raise VerificationError(f"NF4 comes back {error:.3g} away")
    return f"{device}: NF4 comes back within {error:.2f} of the largest weight"


def _try_triton() -> str:
    if not torch.cuda.is_available():
        raise NotHereError("its kernels run on CUDA devices only; plain torch is used")
    return f"version {importlib.import_module('triton').__version__}"


def _try_kit_base() -> str:
    base = load_base(KIT_BASE)
    ids = base.tokenizer("Once upon a time", return_tensors="pt")["input_ids"].to(base.device)
    with torch.inference_mode():
        finite = bool(base.model(input_ids=ids).logits.isfinite().all())
    if not finite:
        raise VerificationError("its logits are not finite")
    return (
        f"{sum(p.numel() for p in base.model.parameters()) / 1e6:.1f} M parameters, {base.model.dtype}, {base.device}"
    )


def _try_writing() -> str:
    here = Path.cwd()
    with tempfile.NamedTemporaryFile(dir=here) as file:
        file.write(b"lora_kit")
        file.flush()
        os.fsync(file.fileno())
    status = os.statvfs(here)
    return f"{here}: {status.f_bavail * status.f_frsize / _GB:.1f} GB free"


CHECKS: Final[Mapping[str, Callable[[], str]]] = {
    "LoRA step, fp32": lambda: _try_training_step(torch.float32),
    "LoRA step, bf16": lambda: _try_training_step(torch.bfloat16),
    "kit-base": _try_kit_base,
    "torch.compile": _try_compile,
    "bitsandbytes, 4-bit": _try_four_bit,
    "Triton": _try_triton,
    "writing here": _try_writing,
}
"""The trials by name."""


@contextlib.contextmanager
def _silence_warnings() -> Iterator[None]:
    """Keeps warnings, and bitsandbytes' line about `kernels`, out of the report."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _installed_version_of(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _describe_processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _count_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _describe_memory() -> str:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return "unknown"
    return f"{total / _GB:.1f} GB, {free / _GB:.1f} GB free"
