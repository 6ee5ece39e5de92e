"""`python -m tools.scan_models`: try an adapter on all model classes, write the results and their page.

One class after another, in a process with a limit of time and of memory, so a crash or a hang is a row. One class of
each family comes first, then the others. What `benchmarks/results/models_scan.json` holds already is not tried again:
a scan that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Final

import torch
import transformers

from tools.scan_models.page import write_page
from tools.scan_models.trial import try_class
from tools.scan_models.worker import Worker

RESULTS: Final = Path(__file__).parents[2] / "benchmarks" / "results" / "models_scan.json"
_PREFERRED: Final = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForSequenceClassification",
                     "ForImageClassification", "ForAudioClassification", "ForCTC", "Model")  # fmt: skip
_IS_MODEL: Final = re.compile(
    "For|(Model|WithProjection|WithLMHead|Backbone|Encoder|Decoder|Reader|VQVAE|VisionTransformer|HifiGan|Code2Wav)$"
)
_ABSTRACT: Final = re.compile("PreTrained|Pretrained|Output|^Auto|_MAPPING|VisualFeatureEncoder")


def main() -> None:
    """Try classes until the time is up, and write the page."""
    parser = argparse.ArgumentParser(description="Try an adapter on every model class of transformers.")
    parser.add_argument("--minutes", type=float, default=25, help="stop after so many")
    parser.add_argument("--only", default="", help="classes with this in their name, whatever is known of them")
    parser.add_argument("--again", default="", help="try those with this status again")
    options = parser.parse_args()
    end, rows, families = time.monotonic() + 60 * options.minutes, _read_rows(), list_classes()
    torch.set_num_threads(1)
    try_class(transformers.BertForSequenceClassification)  # what it imports need not be imported by every process
    worker = Worker()
    for name, family in families.items():
        known = rows.get(name)
        wanted = options.only in name if options.only else known is None or known["status"] == options.again
        if wanted and time.monotonic() < end:
            outcome = worker.try_class(name)
            rows[name] = {"family": family, **dataclasses.asdict(outcome)}
            print(f"{name}: {outcome.status}, {outcome.detail}", flush=True)
            _write_rows(rows)
    worker.close()
    write_page(rows, total=len(families))


def list_classes() -> dict[str, str]:
    """Return the names of the model classes of transformers, with their families: one of each family, then the others.

    Nothing is imported for it: where a class is defined stands in a table of the package.
    """
    modules: dict[str, str] = transformers._class_to_module
    family_of = {
        name: modules[name].split(".")[-2]
        for name in sorted(modules, key=_rank)
        if ".modeling_" in modules[name] and _IS_MODEL.search(name) and not _ABSTRACT.search(name)
    }
    first: dict[str, str] = {}
    for name, family in family_of.items():
        first.setdefault(family, name)
    others = sorted(family_of.items(), key=lambda item: item[1])  # together, so that each module is imported once
    return {name: family for family, name in first.items()} | dict(others)


def _rank(name: str) -> tuple[int, str]:
    endings = [index for index, ending in enumerate(_PREFERRED) if name.endswith(ending)]
    return (endings[0] if endings else len(_PREFERRED)), name


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
