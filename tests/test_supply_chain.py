"""What cannot come in: code in a pickle, code that a model brings, and a network that nobody asked for."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

import lora_kit as lk
from lora_kit.cli.main import main
from lora_kit.errors import BaseModelError
from tests.support.pages import ROOT

SOURCES = sorted((ROOT / "lora_kit").rglob("*.py"))
CODE_READERS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
"""Modules that run code of what they read."""
NETWORK = {"aiohttp", "ftplib", "httpx", "requests", "smtplib", "urllib", "urllib3"}
"""Modules that reach a network; the hub is reached by `lora_kit.io.hub` and `lora_kit.data.hub_datasets` alone."""
ASKED = {
    "lora_kit/serving/parity.py": {"imports urllib.error", "imports urllib.request"},
    "lora_kit/training/loop/reward_functions.py": {"calls exec", "calls compile"},
    "lora_kit/training/loop/store_exchange.py": {"imports pickle"},
    "lora_kit/training/loop/world.py": {"imports pickle"},
}
"""What is reached because its address was given: `lora-kit parity` compares with a server at a URL, the processes of
one training exchange values through the store of their launcher, as torch.distributed does, and a training runs the
file of reward functions that its recipe names."""


def problems_of(source: str) -> list[str]:
    """What in a piece of Python reads a pickle with code, runs code of a file, or reaches a network."""
    return [f"line {node.lineno}: {what}" for node in ast.walk(ast.parse(source)) for what in find_problems(node)]  # type: ignore[attr-defined]


def find_problems(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        yield from (f"imports {name}" for name in names if name.partition(".")[0] in CODE_READERS | NETWORK)
    elif isinstance(node, ast.Dict):
        pairs = [(ast.unparse(key), value) for key, value in zip(node.keys, node.values, strict=True) if key]
        yield from find_code_switches({key.strip("'\""): value for key, value in pairs})
    elif isinstance(node, ast.Call):
        called, named = ast.unparse(node.func), {word.arg or "**": word.value for word in node.keywords}
        yield from find_code_switches(named)
        if called == "torch.load" and not is_constant(named.get("weights_only"), True):
            yield "torch.load without weights_only=True"
        if called in ("eval", "exec", "compile", "__import__", "yaml.unsafe_load", "yaml.full_load"):
            yield f"calls {called}"
        if called == "yaml.load" and not re.search("Safe|Strict", ast.unparse(node)):
            yield "yaml.load with a loader that makes objects"


def find_code_switches(named: dict[str, ast.expr]) -> Iterator[str]:
    for switch in ("trust_remote_code", "allow_pickle"):
        if is_constant(named.get(switch), True):
            yield f"{switch} is on"


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "from urllib.request import urlopen",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "numpy.load(file, allow_pickle=True)",
        "exec(text)",
        "yaml.load(text, Loader=yaml.Loader)",
    ],
)
def test_what_would_let_code_or_a_network_in_is_found(planted: str) -> None:
    assert problems_of(planted)


def test_nothing_in_the_package_reads_code_or_reaches_a_network_of_its_own() -> None:
    assert len(SOURCES) > 200
    found = {str(path.relative_to(ROOT)): problems_of(path.read_text("utf-8")) for path in SOURCES}
    short = {path: {problem.partition(": ")[2] for problem in problems} for path, problems in found.items() if problems}
    assert short == ASKED


# No network unless it was asked for


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Online as far as the libraries know; every way to a network is closed, and what was tried is listed."""
    tried: list[str] = []

    def refuse(*given: Any, **_: Any) -> Any:
        tried.append(str(given[:2]))
        raise ConnectionRefusedError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return tried


RECIPE = {"base": "base-folder", "data": "train.jsonl", "out": "adapters/new", "train": {"max_steps": 1}}
VERBS = {
    "list": ["list"],
    "inspect": ["inspect", "sql"],
    "check": ["check", "sql", "--target", "vllm"],
    "compare": ["compare", "sql", "sql-small"],
    "prepare": ["prepare", "rows.csv", "--base", "base-folder", "--out", "prepared"],
    "preview": ["preview", "recipe.yaml"],
    "train": ["train", "recipe.yaml"],
    "eval": ["eval", "--base", "base-folder", "--adapter", "sql", "--data", "test.jsonl"],
    "generate": ["generate", "--base", "base-folder", "--adapter", "sql", "--prompt", "a", "--max-new-tokens", "2"],
    "merge": ["merge", "--base", "base-folder", "--adapter", "sql", "--out", "merged"],
    "export": ["export", "sql", "--target", "vllm", "--out", "exported"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_command_on_local_files_asks_no_network(
    verb: str, here: Path, attempts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE), "utf-8")
    code = main(VERBS[verb])
    assert (code, attempts) == (0, []), capsys.readouterr().err


def test_a_hub_id_asks_and_the_closed_network_is_seen(here: Path, attempts: list[str]) -> None:
    with pytest.raises(BaseModelError, match="the hub did not answer"):
        lk.load_base("nobody/nothing")
    assert attempts


# What is installed with it


def requirements() -> dict[str, str]:
    """Name and bounds of everything that is required, extras too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [
        line
        for name, lines in project["optional-dependencies"].items()
        if name not in ("bench", "dev")
        for line in lines
    ]
    return dict(re.fullmatch(r"([\w-]+)(.*)", line).groups() for line in [*project["dependencies"], *extras])  # type: ignore[union-attr, misc]


def test_every_dependency_has_a_lower_bound_that_is_met_and_a_reason_for_it() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    for name, bounds in requirements().items():
        lower = re.match(r">=([\d.]+)", bounds)
        assert lower, f"{name} has no lower bound"
        assert re.search(rf'^    "{name}>=[^"]*",  # \w', text, re.MULTILINE), f"{name}: no reason beside its bounds"
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra that is not installed here
        assert as_numbers(installed) >= as_numbers(lower[1]), f"{name} {installed} is below {lower[1]}"


def as_numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))
