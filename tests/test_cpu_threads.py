"""Threads on a CPU: chosen before torch is imported from what the process may use; the user's environment wins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kit.cpu_threads import THREADS, WAITING, choose_cpu_threads, choose_variables, count_cores, read_cpu_quota


@pytest.mark.parametrize(
    ("environment", "cores", "quota", "expected"),
    [
        ({}, 8, None, {"GOMP_SPINCOUNT": "1000"}),
        ({}, 8, 2.5, {"GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "2"}),
        ({}, 8, 0.5, {"GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "1"}),
        ({}, 2, 4.0, {"GOMP_SPINCOUNT": "1000"}),
        ({"OMP_WAIT_POLICY": "active"}, 8, 2.0, {"OMP_NUM_THREADS": "2"}),
        ({"GOMP_SPINCOUNT": "7", "OMP_NUM_THREADS": "3"}, 8, 2.0, {}),
        ({"MKL_NUM_THREADS": "3"}, 8, 2.0, {"GOMP_SPINCOUNT": "1000"}),
    ],
)
def test_what_is_chosen(environment: dict[str, str], cores: int, quota: float | None, expected: dict[str, str]) -> None:
    assert choose_variables(environment, cores=cores, quota=quota) == expected


@pytest.mark.parametrize(
    ("files", "own", "quota"),
    [
        ({}, "0::/\n", None),
        ({"cpu.max": "max 100000\n"}, "0::/\n", None),
        ({"cpu.max": "150000 100000\n"}, "0::/\n", 1.5),
        ({"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, "0::/a/b\n", 3.0),
        ({"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "200000 100000\n"}, "0::/a/b\n", 1.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "4:cpu:/\n", None),
        ({"cpu/x/cpu.cfs_quota_us": "50000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, "4:cpu:/x\n", 0.5),
        ({"cpu.max": "nonsense\n"}, "\0::::", None),
    ],
)
def test_the_quota_is_the_least_of_the_groups(
    tmp_path: Path, files: dict[str, str], own: str, quota: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    (tmp_path / "own").write_text(own)
    assert read_cpu_quota(tmp_path / "groups", tmp_path / "own") == quota


def test_cores_are_those_that_the_process_may_run_on() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from lora_kit.cpu_threads import count_cores; print(count_cores())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "1\n"
    assert 1 <= count_cores() <= (os.cpu_count() or 1)


def test_nothing_is_set_once_torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch  # noqa: F401 - as every process that computes has it

    for name in (*THREADS, *WAITING):
        monkeypatch.delenv(name, raising=False)
    choose_cpu_threads()
    assert not any(name in os.environ for name in WAITING)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "waiting: GOMP_SPINCOUNT=1000, chosen by lora-kit"),
        ({"OMP_WAIT_POLICY": "passive"}, "waiting: OMP_WAIT_POLICY=passive, from the environment"),
    ],
)
def test_the_command_line_sets_it_before_torch_and_says_so(given: dict[str, str], expected: str) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in (*THREADS, *WAITING)}
    code = (
        "from lora_kit.cli import main; main(['--version'])\n"
        "from lora_kit.cpu_threads import describe_cpu_threads; import sys\n"
        "assert 'torch' not in sys.modules; print(describe_cpu_threads(3))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **given}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f"3 CPU threads (torch's own choice), {expected}"
