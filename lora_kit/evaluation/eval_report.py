"""The report of an evaluation of several adapters: their metrics side by side, and the answers of each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_kit.adapter.store import to_json_value
from lora_kit.data.messages import Conversation
from lora_kit.evaluation.generation_metrics import Prompt
from lora_kit.io.atomic_write import write_file
from lora_kit.io.output_file import check_output_file
from lora_kit.models.tasks import NEXT

Answer = str | tuple[str, ...]
"""A text or a label; for labeled words, one label for each word."""


@dataclass(frozen=True)
class EvalCase:
    """A row, or the rows with one prompt.

    Attributes:
        lines: lines of the rows in the file.
        given: the prompt, the conversation so far, the text, or the words.
        expected: the right answer: every reference, or the label (of each word).
    """

    lines: tuple[int, ...]
    given: Prompt | tuple[str, ...]
    expected: Answer


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of one adapter.

    Attributes:
        name: the adapter's label, or `base`.
        digest: digest of the adapter; None for the base.
        metrics: values of the metrics, by name.
        said: the answer to each case; empty if no metric needs answers.
        unended: how many generated texts were cut off before they ended.
        misses: how wrong each answer is, see `lora_kit.evaluation.outcomes.measure_misses`; empty for texts.
    """

    name: str
    digest: str | None
    metrics: Mapping[str, float]
    said: tuple[Answer, ...] = ()
    unended: int = 0
    misses: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """The report of an evaluation.

    Attributes:
        data: the file.
        task: the task of the adapters.
        rows: number of rows in the file.
        cases: the rows or prompts that were answered; empty if no metric needs answers.
        results: one for each adapter, in the order given.
        seconds: wall time, without loading the base.
        kind: of the samples, as in `lora_kit.models.tasks`.
        labels: the names of the labels; empty where the task has none.
        text_pairs: whether each row has two texts.
    """

    data: Path
    task: str
    rows: int
    cases: tuple[EvalCase, ...]
    results: tuple[Result, ...]
    seconds: float
    kind: str = NEXT
    labels: tuple[str, ...] = ()
    text_pairs: bool = False

    def __getitem__(self, name: str) -> Result:
        """Return the result of an adapter by its label."""
        return {result.name: result for result in self.results}[name]

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON values, without the cases."""
        results = [
            {"name": each.name, "digest": each.digest, "metrics": to_json_value(each.metrics), "unended": each.unended}
            for each in self.results
        ]
        return {
            "data": str(self.data),
            "task": self.task,
            "rows": self.rows,
            "seconds": round(self.seconds, 3),
            "results": results,
        }

    def lines(self) -> Iterator[dict[str, object]]:
        """Yield each case as JSON values, with the answers of all adapters."""
        for index, case in enumerate(self.cases):
            yield {
                "lines": list(case.lines),
                "given": _input_to_json(case.given),
                "expected": to_json_value(case.expected),
                "said": {each.name: to_json_value(each.said[index]) for each in self.results},
            }

    def save(self, path: str | Path, *, replace: bool = False) -> None:
        """Write the cases as JSONL, a line for each, all or nothing.

        Raises:
            StorageError: the file exists, or cannot be written.
        """
        path = Path(path)
        check_output_file(path, replace=replace)
        write_file(path, self.to_jsonl())

    def to_jsonl(self) -> bytes:
        """Return the cases as JSONL, a line for each."""
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines()).encode()


def _input_to_json(value: Prompt | tuple[str, ...]) -> object:
    """Return a text or words as they are, and a conversation as a list of messages."""
    if isinstance(value, str):
        return value
    return value.to_json()["messages"] if isinstance(value, Conversation) else list(value)


def collect_metric_names(results: Sequence[Result]) -> list[str]:
    """Return the names of all metrics of some results, in their order."""
    return list(dict.fromkeys(name for result in results for name in result.metrics))
