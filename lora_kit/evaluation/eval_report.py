"""What an evaluation of several adapters found: their metrics side by side, and what each of them said."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit.adapter.store import to_json_value
from lora_kit.errors import StorageError
from lora_kit.evaluation.generation_metrics import Prompt
from lora_kit.io.atomic_write import stage_file
from lora_kit.io.text import escape_text

Answer = str | tuple[str, ...]
"""A text or a label; of a text with labelled words, one label for each."""


@dataclass(frozen=True)
class EvalCase:
    """A row, or the rows with one prompt.

    Attributes:
        lines: where it stands in the file.
        given: the prompt, the conversation so far, the text, or the words.
        expected: what would have been right: every reference, or the label (of each word).
    """

    lines: tuple[int, ...]
    given: Prompt | tuple[str, ...]
    expected: Answer


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one adapter reached.

    Attributes:
        name: the adapter's label, or `base`.
        digest: of the adapter; None for the base.
        metrics: by name.
        said: what it said of each case; empty where no metric is about that.
        unended: how many of the texts were cut off before they ended.
    """

    name: str
    digest: str | None
    metrics: Mapping[str, float]
    said: tuple[Answer, ...] = ()
    unended: int = 0


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """What an evaluation found.

    Attributes:
        data: the file.
        task: what the adapters were made for.
        rows: of the file.
        cases: what was asked, where what is said was looked at.
        results: one for each adapter, in the order given.
        seconds: wall time, without loading the base.
    """

    data: Path
    task: str
    rows: int
    cases: tuple[EvalCase, ...]
    results: tuple[Result, ...]
    seconds: float

    def __getitem__(self, name: str) -> Result:
        """The result of an adapter by its label."""
        return {result.name: result for result in self.results}[name]

    def to_json(self) -> dict[str, Any]:
        """JSON values, without the cases."""
        results = [
            {"name": each.name, "digest": each.digest, "metrics": to_json_value(each.metrics), "unended": each.unended}
            for each in self.results
        ]
        told = {"data": str(self.data), "task": self.task, "rows": self.rows, "seconds": round(self.seconds, 3)}
        return {**told, "results": results}

    def lines(self) -> Iterator[dict[str, Any]]:
        """Each case as JSON values, with what everyone said of it."""
        for place, case in enumerate(self.cases):
            given = case.given
            if isinstance(given, tuple) and given and isinstance(given[0], tuple):
                given = [{"role": role, "content": content} for role, content in given]  # type: ignore[assignment]
            said = {each.name: to_json_value(each.said[place]) for each in self.results}
            yield {"lines": list(case.lines), "given": given, "expected": to_json_value(case.expected), "said": said}

    def save(self, path: str | Path, *, replace: bool = False) -> None:
        """Write the cases as JSONL, a line for each, all or nothing.

        Raises:
            StorageError: there is a file already, or it cannot be written.
        """
        path = Path(path)
        check_predictions_file(path, replace=replace)
        with stage_file(path) as staging, staging.open("x", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines())


def check_predictions_file(path: Path, *, replace: bool) -> None:
    """Refuse a file that cannot be written, before hours of work and not after.

    Raises:
        StorageError: it exists, or its folder does not.
    """
    if path.is_dir():
        raise StorageError(f"{escape_text(path)} is a folder", hint="predictions are written to one file")
    if path.exists() and not (replace and path.is_file()):
        raise StorageError(f"{escape_text(path)} exists", hint="--replace replaces it")
    if not path.parent.is_dir():
        raise StorageError(f"{escape_text(path.parent)} is no folder, so {escape_text(path)} cannot be written")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise StorageError(f"{escape_text(path)} cannot be written: {escape_text(path.parent)} may not be written to")


def metric_names_of(results: Sequence[Result]) -> list[str]:
    """The names of all metrics of some results, in their order."""
    return list(dict.fromkeys(name for result in results for name in result.metrics))
