"""Do programs of others find what they expect of our server?

vLLM's own benchmark of servers asks 200 times, 16 at once, for the base and three adapters. schemathesis makes requests
from the description of our API, valid and not, with the names of the models as an enumeration: no answer may be a
fault of the server, of a status that is not documented, or of another form than is documented. Each program is in an
environment of its own below `.programs` (see `tests.programs.environments`), and is left out where it cannot be had.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from benchmarks.serving_faults import server_process
from benchmarks.serving_models import BASE, adapter, load

_PROGRAMS: Final = Path(__file__).resolve().parents[1] / ".programs"
_NAMES: Final = ("one", "two", "three")
_ASKED: Final = 200
_CHECKS: Final = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


def clients(programs: Path = _PROGRAMS) -> dict[str, Any]:
    """What each program found, by its name; why it was left out where it could not be had."""
    from tests.programs.environments import UnavailableError, install

    base, found = load(), dict[str, Any]()
    ways: dict[str, Callable[[Path, Path, Any], Any]] = {"vllm": bench_with_vllm, "schemathesis": check_the_schema}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base.tokenizer.save_pretrained(folder / "tokenizer")
        for seed, name in enumerate(_NAMES):
            adapter(base, seed, r=4).save(folder / "store" / name)
        with server_process(folder / "store", folder / "state.json") as (_, client):
            for program, run in ways.items():
                try:
                    binaries = install(program, programs, say=print) / "bin"
                except UnavailableError as error:
                    found[program] = str(error)
                else:
                    found[program] = run(binaries, folder, client)
    return found


def bench_with_vllm(binaries: Path, folder: Path, client: Any) -> dict[str, int]:
    """Return how many requests of `vllm bench serve` were answered."""
    command = [binaries / "python", binaries / "vllm", "bench", "serve", "--backend", "openai"]
    command += ["--base-url", str(client.base_url).rstrip("/"), "--endpoint", "/v1/completions"]
    command += ["--model", BASE, "--tokenizer", folder / "tokenizer", "--lora-modules", *_NAMES]
    command += ["--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "16"]
    command += ["--num-prompts", str(_ASKED), "--max-concurrency", "16", "--seed", "1"]
    return {"asked": _ASKED, "answered": read_number(r"Successful requests:\s+(\d+)", run_program(command, folder))}


def check_the_schema(binaries: Path, folder: Path, client: Any) -> dict[str, int]:
    """Return how many requests schemathesis made from the API's description, and how many answers were wrong."""
    description = client.get("/openapi.json").json()
    name_models(description)
    schema = folder / "openapi.json"
    schema.write_text(json.dumps(description), encoding="utf-8")
    command = [binaries / "schemathesis", "run", schema, "--url", str(client.base_url).rstrip("/")]
    command += ["--checks", ",".join(_CHECKS), "--phases", "examples,coverage,fuzzing", "--max-examples", "25"]
    output = run_program([*command, "--request-timeout", "60", "--seed", "1"], folder)
    failures = re.search(r"generated, (\d+) found", output)
    return {
        "requests": read_number(r"([\d,]+) generated", output),
        "wrong": int(failures[1]) if failures else 0,
    }


def name_models(part: Any) -> None:
    """Let every `model` of an API's description be one that is served, or one that is not."""
    if isinstance(part, dict):
        properties = part.get("properties")
        if isinstance(properties, dict) and "model" in properties:
            properties["model"] = {"type": "string", "enum": [BASE, *_NAMES, "nobody"]}
        part = list(part.values())
    for each in part if isinstance(part, list) else ():
        name_models(each)


def run_program(command: list[Any], folder: Path) -> str:
    """Return what a program prints, however it ends; what it writes goes to a folder."""
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=1800, check=False)
    return done.stdout + done.stderr


def read_number(pattern: str, output: str) -> int:
    """Return a number in what a program printed.

    Raises:
        ValueError: it is not there: the program did not run.
    """
    found = re.search(pattern, output)
    if found is None:
        raise ValueError(f"{pattern} is not in the output:\n{output[-2000:]}")
    return int(found[1].replace(",", ""))
