"""`doctor`: versions and devices of this machine, and a small real check of everything the package depends on."""

from __future__ import annotations

import importlib
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final, Literal

import torch

from lora_kit.bank.attach import attach
from lora_kit.config.lora_config import LoraConfig
from lora_kit.cpu_threads import count_cores, describe_cpu_threads
from lora_kit.errors import LoraKitError, VerificationError
from lora_kit.io.text import escape_text
from lora_kit.models.loading import load_base
from lora_kit.names import KIT_BASE
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
State = Literal["good", "failed", "not here"]
"""`not here`: the check does not apply to this machine, which is no failure."""


class NotHereError(LoraKitError):
    """A check does not apply to this machine."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one check.

    Attributes:
        name: what was checked.
        state: `good`, `failed` or `not here`.
        seconds: wall time.
        note: what was measured, or why the check failed.
    """

    name: str
    state: State
    seconds: float
    note: str

    def to_json(self) -> dict[str, object]:
        """Return the result as JSON values."""
        return {"name": self.name, "state": self.state, "seconds": round(self.seconds, 4), "note": self.note}


@dataclass(frozen=True, kw_only=True)
class Examination:
    """The result of all checks.

    Attributes:
        facts: versions, processor, memory and devices, by name.
        checks: the results, in the order of the checks.
    """

    facts: Mapping[str, str]
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the checks that failed."""
        return tuple(check.name for check in self.checks if check.state == "failed")

    def to_json(self) -> dict[str, object]:
        """Return the result as JSON values."""
        return {"facts": dict(self.facts), "checks": [check.to_json() for check in self.checks]}


def examine(checks: Mapping[str, Callable[[], str]] | None = None) -> Examination:
    """Describe the machine and run every check once; a failed check is a result, never an exception.

    Args:
        checks: checks by name, each returning a note or raising; `CHECKS` by default.
    """
    checks = CHECKS if checks is None else checks
    return Examination(facts=collect_facts(), checks=tuple(_run_check(name, check) for name, check in checks.items()))


def collect_facts() -> dict[str, str]:
    """Return versions, processor, memory and devices, by name."""
    facts = {
        "lora_kit": __version__,
        "python": f"{platform.python_version()} ({platform.system()} {platform.release()})",
    }
    facts |= {name: _find_version(name) for name in LIBRARIES}
    facts["processor"] = f"{_describe_processor()}, {count_cores()} cores for this process"
    facts["threads"] = describe_cpu_threads(torch.get_num_threads())
    facts["memory"] = _describe_memory()
    return facts | (_describe_devices() or {"cuda": "no device"})


def _describe_devices() -> dict[str, str]:
    """Return each CUDA device, by its name in torch."""
    devices = {}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"compute {device.major}.{device.minor}"
        memory = f"{device.total_memory / _GB:.1f} GB"
        devices[f"cuda:{index}"] = f"{device.name}, {memory}, {capability}, CUDA {torch.version.cuda}"
    return devices


def _run_check(name: str, check: Callable[[], str]) -> Check:
    started = time.perf_counter()
    state: State = "good"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            note = check()
    except NotHereError as reason:
        state, note = "not here", reason.message
    except Exception as error:  # any failure is a finding
        lines = str(error).strip().splitlines() or ["no message"]
        state, note = "failed", f"{type(error).__name__}: {lines[0]}"
    return Check(name=name, state=state, seconds=time.perf_counter() - started, note=escape_text(note))


def _check_training_step(dtype: torch.dtype) -> str:
    """Train an adapter on a tiny decoder: the loss must fall, and no base weight may change."""
    device = _choose_device()
    model = _build_tiny_decoder(device, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
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
    after = model.state_dict()
    changed = [name for name, tensor in base.items() if not torch.equal(tensor, after[name])]
    if changed or not losses[-1] < losses[0]:
        raise VerificationError(f"loss {losses[0]:.4f} to {losses[-1]:.4f}; base tensors changed: {len(changed)}")
    return f"{device.type}: loss {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps"


def _build_tiny_decoder(device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: torch.nn.Module = transformers.LlamaForCausalLM(config)
    return model.to(device, dtype)


def _choose_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _check_compile() -> str:
    def product(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ x.T) + 1

    device = _choose_device()
    x = torch.linspace(-1, 1, 64, device=device).view(8, 8)
    try:
        compiled = torch.compile(product)(x)
    except Exception as error:
        if "compiler" in str(error).lower() and device.type == "cpu":
            message = "no C++ compiler, which torch.compile needs on a CPU; everything else works without"
            raise NotHereError(message) from None
        raise
    difference = float((compiled - product(x)).abs().max())
    if difference > 1e-5:
        raise VerificationError(f"compiled and plain differ by {difference:.3g}")
    return f"{device.type}: equal to plain torch"


def _check_four_bit() -> str:
    import bitsandbytes.functional as bnb

    device = _choose_device()
    weight = torch.linspace(-1, 1, 64 * 64, device=device).view(64, 64)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
    error = float((bnb.dequantize_4bit(packed, state) - weight).abs().max())
    if error > 0.25:
        raise VerificationError(f"NF4 comes back {error:.3g} away")
    return f"{device.type}: NF4 comes back within {error:.2f} of the largest weight"


def _check_triton() -> str:
    if not torch.cuda.is_available():
        raise NotHereError("its kernels run on CUDA devices only; plain torch is used")
    return f"version {importlib.import_module('triton').__version__}"


def _check_kit_base() -> str:
    base = load_base(KIT_BASE)
    ids = base.tokenizer("Once upon a time", return_tensors="pt")["input_ids"].to(base.device)
    with torch.inference_mode():
        finite = bool(base.model(input_ids=ids).logits.isfinite().all())
    if not finite:
        raise VerificationError("its logits are not finite")
    count = sum(parameter.numel() for parameter in base.model.parameters())
    return f"{count / 1e6:.1f} M parameters, {base.model.dtype}, {base.device}"


def _check_writing() -> str:
    here = Path.cwd()
    with tempfile.NamedTemporaryFile(dir=here) as file:
        file.write(b"lora_kit")
        file.flush()
        os.fsync(file.fileno())
    status = os.statvfs(here)
    return f"{here}: {status.f_bavail * status.f_frsize / _GB:.1f} GB free"


CHECKS: Final[Mapping[str, Callable[[], str]]] = {
    "LoRA step, fp32": lambda: _check_training_step(torch.float32),
    "LoRA step, bf16": lambda: _check_training_step(torch.bfloat16),
    KIT_BASE: _check_kit_base,
    "torch.compile": _check_compile,
    "bitsandbytes, 4-bit": _check_four_bit,
    "Triton": _check_triton,
    "writing here": _check_writing,
}
"""The checks by name."""


def _find_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _describe_processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _describe_memory() -> str:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return "unknown"
    return f"{total / _GB:.1f} GB, {free / _GB:.1f} GB free"
