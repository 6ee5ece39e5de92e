"""Triton's kernels: interpreted on the CPU, compiled for devices that are not here, and run on CUDA where it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kit.errors import ConfigError
from lora_kit.ops import dispatch, torch_kernels
from tests.support import kernels

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA, FP32, BF16 = torch.device("cpu"), torch.device("cuda"), torch.float32, torch.bfloat16
with_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """What `kernels.py` found, in a process of its own: a kernel is interpreted or not from where it is defined."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", dispatch.KERNELS_VARIABLE: "triton", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.kernels"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kernels"] == "lora_kit.ops.triton_kernels"
    wrong: dict[str, str] = found["wrong"]
    return wrong


@with_triton
@pytest.mark.parametrize("check", kernels.CHECKS)
def test_interpreted_kernels_compute_what_fp64_does(check: str, interpreted: dict[str, str]) -> None:
    assert interpreted[check] == ""


@pytest.mark.parametrize("check", kernels.CHECKS)
def test_plain_bodies_pass_the_same_checks(check: str) -> None:
    kernels.CHECKS[check](torch_kernels, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("check", kernels.CHECKS)
def test_kernels_on_cuda_compute_what_fp64_does(check: str) -> None:
    kernels.CHECKS[check](dispatch.choose_kernels(CUDA, FP32), CUDA)


class Absent:
    """A CUDA device of some compute capability that kernels can be compiled for, and not run on."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@with_triton
@pytest.mark.parametrize(
    ("capability", "rank", "of_x", "of_factors"), [(80, 64, BF16, FP32), (90, 16, BF16, BF16), (90, 16, FP32, FP32)]
)
def test_kernels_compile_for_devices_that_are_not_here(
    capability: int,
    rank: int,
    of_x: torch.dtype,
    of_factors: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from lora_kit.ops import triton_kernels

    compiled, run = [], JITFunction.run
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", Absent(capability))
    monkeypatch.setattr(JITFunction, "run", lambda *a, **k: compiled.append(run(*a, **{**k, "warmup": True})))

    a = torch.empty(3, rank, 2048, dtype=of_factors, device="meta")
    b = torch.empty(3, 8192, rank, dtype=of_factors, device="meta")
    scaling, slots = torch.empty(3, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    for n in (1, 40, 8192):
        x = torch.empty(2, n, 2048, dtype=of_x, device="meta")
        y = torch.empty(2, n, 8192, dtype=of_x, device="meta")
        triton_kernels.add_(y[0], x[0], a[0], b[0], 0.5)
        triton_kernels.add_rows_(y, x, a, b, scaling, slots)
        triton_kernels.add_rows_(y[:1], x[:1], a, b, scaling, slots[:1])
    kinds = {kernel.metadata.name for kernel in compiled}
    assert len(kinds) == 4, kinds
    # The least that a device of these generations gives one program.
    assert max(kernel.metadata.shared for kernel in compiled) <= 99 * 1024


def test_cpu_tensors_take_the_plain_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.KERNELS_VARIABLE, raising=False)
    assert all(dispatch.choose_kernels(CPU, dtype) is torch_kernels for dtype in (FP32, BF16, torch.float64))
    monkeypatch.setattr(dispatch, "_kernels_cache", {})
    assert dispatch.get_kernels(torch.zeros(1)) is torch_kernels


@with_triton
def test_cuda_tensors_take_triton_but_not_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_kit.ops import triton_kernels

    monkeypatch.delenv(dispatch.KERNELS_VARIABLE, raising=False)
    assert all(dispatch.choose_kernels(CUDA, dtype) is triton_kernels for dtype in (FP32, BF16, torch.float16))
    assert dispatch.choose_kernels(CUDA, torch.float64) is torch_kernels
    monkeypatch.setenv(dispatch.KERNELS_VARIABLE, "plain")
    assert dispatch.choose_kernels(CUDA, FP32) is torch_kernels


def test_cuda_tensors_take_the_plain_bodies_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.KERNELS_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert dispatch.choose_kernels(CUDA, FP32) is torch_kernels
    monkeypatch.setenv(dispatch.KERNELS_VARIABLE, "triton")
    with pytest.raises(ConfigError, match="triton is not installed"):
        dispatch.choose_kernels(CUDA, FP32)


@pytest.mark.parametrize(
    ("forced", "device", "dtype", "expected"),
    [
        ("triton", CPU, FP32, "the tensors are on cpu"),
        ("triton", CUDA, torch.float64, "do not compute in torch.float64"),
        ("trition", CUDA, FP32, "names no kernels"),
    ],
)
def test_kernels_that_cannot_be_had_are_an_error(
    forced: str, device: torch.device, dtype: torch.dtype, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(dispatch.KERNELS_VARIABLE, forced)
    with pytest.raises(ConfigError, match=expected):
        dispatch.choose_kernels(device, dtype)


@with_triton
def test_fp32_is_multiplied_in_fp32_unless_torch_may_do_less() -> None:
    from lora_kit.ops.triton_kernels import _precision

    x, before = torch.zeros(1), torch.get_float32_matmul_precision()
    assert _precision(x) == "ieee"
    try:
        torch.set_float32_matmul_precision("high")
        assert _precision(x) == "tf32"
        assert _precision(x.half()) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_importing_the_operations_imports_no_triton() -> None:
    code = (
        "import sys, torch; from lora_kit.ops import dispatch; dispatch.get_kernels(torch.zeros(1)); "
        "print('triton' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert printed.strip() == "False"
