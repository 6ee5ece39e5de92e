"""vLLM on a CPU: adapters and the base, alone and mixed, beside what our own bank writes, token for token."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import random
import re
import shlex
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

import lora_kit as lk
from lora_kit.exporters.export import check
from lora_kit.models.loading import Base
from tests.programs.cases import Case

NEW_TOKENS: Final = 24
CONCURRENCIES: Final = (4, 16, 64)
REQUESTS: Final = 1000
"""In all, at each of the two higher concurrencies half of them."""
_START_SECONDS: Final = 600
_PROMPT_LENGTHS: Final = (5, 60)
_OPTIONS: Final = ("--dtype", "float32", "--max-model-len", "512", "--enforce-eager")
_ENVIRONMENT: Final = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True)
class Answers:
    """What came of many requests.

    Attributes:
        requests: how many.
        wrong: how many have other tokens than ours.
        wrong_base: how many of these are requests to the base.
        seconds: in all.
    """

    requests: int
    wrong: int
    wrong_base: int
    seconds: float


@dataclass(frozen=True)
class Question:
    """A prompt to one adapter, or to the base, and our own answer to it."""

    adapter: str | None
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def write_questions(base: Base, adapters: Mapping[str, Path], *, prompts: int = 8) -> list[Question]:
    """Return every prompt to every adapter and to the base, each answered greedily by our own bank, alone."""
    bank = lk.attach(base.model, slots=len(adapters), max_rank=64)
    generator = random.Random(3)
    texts = [
        tuple(generator.randrange(3, len(base.tokenizer) - 1) for _ in range(generator.randint(*_PROMPT_LENGTHS)))
        for _ in range(prompts)
    ]
    try:
        for name, folder in adapters.items():
            bank.load(name, folder)
        return [
            Question(name, prompt, _answer(base, bank, name, prompt)) for name in (None, *adapters) for prompt in texts
        ]
    finally:
        bank.detach()


@torch.no_grad()
def _answer(base: Base, bank: lk.AdapterBank, name: str | None, prompt: tuple[int, ...]) -> tuple[int, ...]:
    with bank.using(name):
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        written = base.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return tuple(written[0, len(prompt) :].tolist())


@contextlib.contextmanager
def serve(command: Sequence[str], *, environment: Path, log: Path) -> Iterator[str]:
    """Run a server, and yield its address when it is ready.

    Raises:
        RuntimeError: it ended, or was not ready in time.
    """
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, **_ENVIRONMENT, "PATH": path, "HF_HUB_OFFLINE": "1"}
    variables.pop("PYTHONPATH", None)
    with log.open("w", encoding="utf-8") as output:
        arguments = [*command, "--port", str(port), "--host", "127.0.0.1"]
        process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT, env=variables)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_until_ready(process, address, log)
            yield address
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            process.kill()


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()][-1:]
            raise RuntimeError(f"vLLM ended with {process.returncode}: {' '.join(last)}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
            return
        time.sleep(1)
    raise RuntimeError(f"vLLM was not ready after {_START_SECONDS} s")


def ask(address: str, questions: Sequence[Question], *, base: str, together: int) -> Answers:
    """Ask some questions, so many at once, and count the answers that differ from ours."""
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(together) as pool:
        right = list(pool.map(lambda question: _is_right(address, question, base), questions))
    wrong = [question for question, good in zip(questions, right, strict=True) if not good]
    at_base = sum(question.adapter is None for question in wrong)
    return Answers(len(questions), len(wrong), at_base, round(time.perf_counter() - started, 1))


def _is_right(address: str, question: Question, base: str) -> bool:
    body: dict[str, Any] = {"model": question.adapter or base, "prompt": list(question.prompt), "temperature": 0}
    body |= {"max_tokens": NEW_TOKENS, "min_tokens": NEW_TOKENS, "return_token_ids": True}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        (choice,) = json.load(answer)["choices"]
    return tuple(choice["token_ids"]) == question.answer


def read_printed_command(export: Path) -> list[str]:
    """Return the command in the README of an export for vLLM, as it is printed there."""
    text = (export / "README.md").read_text(encoding="utf-8")
    match = re.search(r"```sh\n(vllm serve .*?)\n```", text, re.DOTALL)
    if match is None:
        raise RuntimeError(f"{export}: its README has no command")
    return shlex.split(match[1])


def run_vllm(cases: Sequence[Case], environment: Path, folder: Path) -> dict[str, Any]:
    """Ask vLLM what our bank was asked: by the printed command, by all adapters at once, and with a slot too few.

    Returns:
        Answers by the name of a setting; `slot too few` has to find wrong answers of the base.
    """
    chosen = [case for case in cases if case.base == "kit-base" and case.adapter_folder is not None]
    adapters, exports = {}, {}
    for case in chosen:
        assert case.feature is not None
        assert case.adapter_folder is not None
        if not check(case.adapter_folder, "vllm", base=case.base_folder).refused:
            adapters[case.feature], exports[case.feature] = case.adapter_folder, folder / "exports" / case.feature
            lk.export(case.adapter_folder, "vllm", exports[case.feature], base=case.base_folder, replace=True)
    base = lk.load_base(chosen[0].base_folder, dtype="fp32", device="cpu")
    questions = write_questions(base, adapters)
    results: dict[str, Any] = {}
    first = next(iter(adapters))
    printed = [*read_printed_command(exports[first]), *_OPTIONS]
    with serve(printed, environment=environment, log=folder / "printed.log") as address:
        some = [question for question in questions if question.adapter in (None, first)]
        results["printed command, 16 at once"] = ask(address, some * 4, base=base.name, together=16)
    for setting, slots in (("", len(adapters) + 1), ("slot too few, ", len(adapters))):
        command = _write_command(base.name, exports, slots=slots)
        with serve(command, environment=environment, log=folder / f"slots-{slots}.log") as address:
            for together in CONCURRENCIES if not setting else CONCURRENCIES[1:2]:
                many = _draw(questions, REQUESTS // 2 if together > CONCURRENCIES[0] else len(questions))
                results[f"{setting}{together} at once"] = ask(address, many, base=base.name, together=together)
    return results


def _write_command(base: str, exports: Mapping[str, Path], *, slots: int) -> list[str]:
    modules = [f"{name}={folder}" for name, folder in exports.items()]
    limits = ["--max-loras", str(slots), "--max-lora-rank", "16"]
    return ["vllm", "serve", base, "--enable-lora", *limits, "--lora-modules", *modules, *_OPTIONS]


def _draw(questions: Sequence[Question], count: int) -> list[Question]:
    generator = random.Random(count)
    return [generator.choice(questions) for _ in range(count)]
