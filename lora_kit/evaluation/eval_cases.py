"""The rows of a file as cases of an evaluation: what was given, and what is expected."""

from __future__ import annotations

from collections.abc import Sequence

from lora_kit.data.rows import Rows
from lora_kit.evaluation.eval_report import Answer, EvalCase
from lora_kit.evaluation.generation_metrics import EvalPrompt
from lora_kit.evaluation.label_answers import format_value


def build_cases(rows: Rows, prompts: Sequence[EvalPrompt]) -> list[EvalCase]:
    """Return a case for each prompt where there are prompts, else for each row with labels."""
    if prompts:
        return [EvalCase(each.lines, each.prompt, each.references) for each in prompts]
    if rows.format == "label":
        return [
            EvalCase((line,), value[0], _name_expected(value[1]))
            for line, value in zip(rows.lines, rows.values, strict=True)
        ]
    if rows.format == "words":
        return [
            EvalCase((line,), value[0], tuple(map(str, value[1])))
            for line, value in zip(rows.lines, rows.values, strict=True)
        ]
    return []


def _name_expected(label: object) -> Answer:
    if isinstance(label, tuple):
        return tuple(map(str, label))
    return format_value(label) if isinstance(label, float) else str(label)
