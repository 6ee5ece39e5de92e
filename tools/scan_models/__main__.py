"""`python -m tools.scan_models [--minutes N] [--again STATUS]`: try all classes, write the results and their page.

One class after another, each in a process of its own with a time limit, so a crash or a hang is a row. One class of
each family comes first, then the others. What `benchmarks/results/models_scan.json` holds already is not tried again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import torch
import transformers

from tools.scan_models.page import write_page
from tools.scan_models.trial import FAILS, NOT_TRIED, Outcome, try_class

RESULTS: Final = Path(__file__).parents[2] / "benchmarks" / "results" / "models_scan.json"
CPU_SECONDS: Final = 60
"""A class may take so much time of a processor, and ten times as long on a busy machine."""
MEMORY_BYTES: Final = 12 * 2**30
_PREFERRED: Final = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForSequenceClassification",
                     "ForImageClassification", "ForAudioClassification", "ForCTC", "Model")  # fmt: skip
_ABSTRACT: Final = re.compile("PreTrainedModel|PretrainedModel|Output|^Auto")


def main() -> None:
    """Try classes until the time is up, and write the page."""
    parser = argparse.ArgumentParser(description="Try an adapter on every model class of transformers.")
    parser.add_argument("--minutes", type=float, default=25, help="stop after so many")
    parser.add_argument("--only", default="", help="classes with this in their name, whatever is known of them")
    parser.add_argument("--again", default="", help="try those with this status again")
    options = parser.parse_args()
    end, rows, families = time.monotonic() + 60 * options.minutes, _read_rows(), list_classes()
    torch.set_num_threads(1)
    try_class(transformers.BertForSequenceClassification)  # what it imports need not be imported for every class
    for name, family in families.items():
        known = rows.get(name)
        wanted = options.only in name if options.only else known is None or known["status"] == options.again
        if wanted and time.monotonic() < end:
            outcome = _try_in_process(name)
            rows[name] = {"family": family, "status": outcome.status, "detail": outcome.detail}
            print(f"{name}: {outcome.status}, {outcome.detail}", flush=True)
            _write_rows(rows)
    write_page(rows, total=len(families))


def list_classes() -> dict[str, str]:
    """Return the names of the model classes of transformers, with their families: one of each family, then the others.

    Nothing is imported for it: where a class is defined stands in a table of the package.
    """
    modules: dict[str, str] = transformers._class_to_module
    family_of = {
        name: modules[name].split(".")[-2]
        for name in sorted(modules, key=_rank)
        if ".modeling_" in modules[name] and (name.endswith("Model") or "For" in name) and not _ABSTRACT.search(name)
    }
    first: dict[str, str] = {}
    for name, family in family_of.items():
        first.setdefault(family, name)
    return {name: family for family, name in first.items()} | family_of


def _rank(name: str) -> tuple[int, str]:
    endings = [index for index, ending in enumerate(_PREFERRED) if name.endswith(ending)]
    return (endings[0] if endings else len(_PREFERRED)), name


def _try_in_process(name: str) -> Outcome:
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_try_and_send, args=(name, send))
    process.start()
    send.close()
    try:
        if not receive.poll(10 * CPU_SECONDS):
            return Outcome(FAILS, f"no answer within {10 * CPU_SECONDS} seconds")
        answer: Outcome = receive.recv()
        return answer
    except EOFError:
        process.join()
        return Outcome(FAILS, f"the process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _try_and_send(name: str, send: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    used = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + CPU_SECONDS, used + CPU_SECONDS))
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    with open(os.devnull, "w") as silence:
        os.dup2(silence.fileno(), 2)
        try:
            kind = getattr(transformers, name)
        except Exception as error:  # a library that the class needs is not installed
            send.send(Outcome(NOT_TRIED, f"it cannot be imported: {error}".splitlines()[0][:160]))
        else:
            send.send(try_class(kind))


def _read_rows() -> dict[str, dict[str, str]]:
    if not RESULTS.exists():
        return {}
    rows: dict[str, dict[str, str]] = json.loads(RESULTS.read_text())["classes"]
    return rows


def _write_rows(rows: dict[str, dict[str, str]]) -> None:
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    RESULTS.write_text(json.dumps({**versions, "classes": dict(sorted(rows.items()))}, indent=1) + "\n")


if __name__ == "__main__":
    main()
