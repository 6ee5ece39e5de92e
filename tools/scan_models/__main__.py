"""`python -m tools.scan_models`: try an adapter on all model classes, write the results and their page.

One class after another, in a process with a limit of time and of memory, so a crash or a hang is a row. What
`benchmarks/results/models_scan.json` holds already is not tried again: a scan that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Final

import torch
import transformers

from lora_kit.io.locks import FileLock
from tools.scan_models.page import write_page
from tools.scan_models.trial import try_class
from tools.scan_models.worker import Worker

RESULTS: Final = Path(__file__).parents[2] / "benchmarks" / "results" / "models_scan.json"
_IS_MODEL: Final = re.compile(
    "For|(Model|WithProjection|WithLMHead|Backbone|Encoder|Decoder|Reader|VQVAE|VisionTransformer|HifiGan|Code2Wav)$"
)
_ABSTRACT: Final = re.compile("PreTrained|Pretrained|Output|^Auto|_MAPPING|VisualFeatureEncoder")


def main() -> None:
    """Try classes until the time is up, and write the page."""
    parser = argparse.ArgumentParser(description="Try an adapter on every model class of transformers.")
    parser.add_argument("--minutes", type=float, default=60, help="stop after so many")
    parser.add_argument("--only", default="", help="classes with this in their name, whatever is known of them")
    parser.add_argument("--again", nargs="*", default=[], help="try those with one of these statuses again")
    parser.add_argument("--share", default="1/1", help="one part of the families, so that several processes can work")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try_class(transformers.BertForSequenceClassification)  # what it imports need not be imported by every process
    families = list_classes()
    names = _choose(families, _read_rows(), options.only, options.again)
    _try_classes(take_share(names, families, options.share), families, time.monotonic() + 60 * options.minutes)
    write_page(_read_rows(), total=len(families))


def _choose(
    families: Mapping[str, str], rows: Mapping[str, Mapping[str, str]], only: str, again: Collection[str]
) -> list[str]:
    """Return the classes to try: those asked for, or those of which nothing is known."""
    if only:
        return [name for name in families if only in name]
    return [name for name in families if name not in rows or rows[name]["status"] in again]


def take_share(names: Iterable[str], families: Mapping[str, str], share: str) -> list[str]:
    """Return the classes of every n-th family."""
    part, parts = map(int, share.split("/"))
    own = sorted(set(families.values()))[part - 1 :: parts]
    return [name for name in names if families[name] in own]


def _try_classes(names: Iterable[str], families: Mapping[str, str], end: float) -> None:
    worker = Worker()
    for name in names:
        if time.monotonic() < end:
            outcome = worker.try_class(name)
            print(f"{name}: {outcome.status}, {outcome.detail}", flush=True)
            _add_row(name, {"family": families[name], **dataclasses.asdict(outcome)})
    worker.close()


def list_classes() -> dict[str, str]:
    """Return the names of the model classes of transformers, with their families, one family after the other.

    Nothing is imported for it: where a class is defined stands in a table of the package.
    """
    modules: dict[str, str] = transformers._class_to_module
    family_of = {
        name: modules[name].split(".")[-2]
        for name in modules
        if ".modeling_" in modules[name] and _IS_MODEL.search(name) and not _ABSTRACT.search(name)
    }
    return dict(sorted(family_of.items(), key=lambda item: (item[1], item[0])))


def _read_rows() -> dict[str, dict[str, str]]:
    if not RESULTS.exists():
        return {}
    rows: dict[str, dict[str, str]] = json.loads(RESULTS.read_text())["classes"]
    return rows


def _add_row(name: str, row: dict[str, str]) -> None:
    """Write one more result. Several processes may do so."""
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    with FileLock(RESULTS.parents[1] / "work" / "models_scan.lock").hold():
        rows = _read_rows() | {name: row}
        RESULTS.write_text(json.dumps({**versions, "classes": dict(sorted(rows.items()))}, indent=1) + "\n")


if __name__ == "__main__":
    main()
