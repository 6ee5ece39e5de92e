"""What judges the programs: an adapter that is ignored is seen, and the page says what was run. No program is run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.programs import __main__ as programs
from tests.programs import logit_checks
from tests.programs.cases import Case
from tests.programs.costs import run_measured
from tests.programs.logit_checks import LogitCheck, write_saved
from tests.programs.page import format_table
from tests.programs.printed import read_block

ALONE = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
CHANGED = ALONE + np.float32(0.5) * np.eye(4, 8, dtype=np.float32)


def run_with(monkeypatch: pytest.MonkeyPatch, folder: Path, answers: Mapping[str, Any], **fields: Any) -> list[str]:
    """Return the verdicts on a base and an adapter, of a program that answers so."""

    def answer(
        reader: str, jobs: Sequence[Mapping[str, Any]], *, python: Path, folder: Path
    ) -> tuple[str, dict[str, dict[str, Any]]]:
        for job in jobs:
            np.save(job["logits"], answers[job["key"]])
        return "1.0", {job["key"]: {"error": None, "seconds": 0.0} for job in jobs}

    monkeypatch.setattr(logit_checks, "run_reader", answer)
    cases = [
        Case("tiny", None, folder, None, (1, 2, 3, 4), ALONE, 0.0),
        Case("tiny", "plain", folder, folder, (1, 2, 3, 4), CHANGED, float(np.abs(CHANGED - ALONE).max())),
    ]
    check = LogitCheck(None, "any", "saved", write_saved, **fields)
    return [outcome.verdict for outcome in check.run(cases, python=Path("python"), folder=folder)[1]]


def normalize(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize(
    ("adapted", "fields", "verdict"),
    [
        (CHANGED + 5e-5, {}, "equal"),
        (CHANGED + 2e-4, {}, "wrong"),
        (ALONE, {}, "wrong"),
        (np.full_like(CHANGED, np.nan), {}, "wrong"),
        (ALONE, {"known_faults": {"plain": "it ignores it"}}, "known"),
        (ALONE, {"known_faults": {"tiny/plain": "it ignores it"}}, "known"),
        (ALONE, {"known_faults": {"large/plain": "it ignores it"}}, "wrong"),
        (CHANGED + 2e-4, {"wide_bounds": {"tiny": 1e-3}}, "equal"),
    ],
)
def test_a_program_is_right_within_the_bound_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, adapted: NDArray[np.float32], fields: dict[str, Any], verdict: str
) -> None:
    verdicts = run_with(monkeypatch, tmp_path, {"tiny/base": ALONE, "tiny/plain": adapted}, **fields)
    assert verdicts == ["equal", verdict]


def test_logarithms_of_probabilities_are_compared_with_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = {"tiny/base": normalize(ALONE), "tiny/plain": normalize(CHANGED)}
    assert run_with(monkeypatch, tmp_path, answers, normalized=True) == ["equal", "equal"]
    assert run_with(monkeypatch, tmp_path, answers) == ["wrong", "wrong"]


def test_an_adapter_without_effect_proves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(logit_checks, "LEAST_EFFECT", 0.6)
    with pytest.raises(RuntimeError, match="too little to be seen"):
        run_with(monkeypatch, tmp_path, {"tiny/base": ALONE, "tiny/plain": CHANGED})


def test_the_page_says_what_was_run_what_is_wrong_elsewhere_and_what_it_takes() -> None:
    cost = {"seconds": 1.5, "megabytes": 1200.0}
    equal = {"verdict": "equal", "difference": 2e-6, "bound": 1e-4, "effect": 0.7}
    served = {"verdict": "equal", "requests": 1000, "wrong_answers": 0}
    fault = {"verdict": "known", "reason": "it is so", "requests": 100, "wrong_answers": 9}
    off = {"verdict": "known", "reason": "it scales wrongly", "difference": 12.5}
    checks = [
        _record("one", "saved", [("a/plain", equal), ("b/plain", equal), ("a/rslora", off)]),
        _record("two", "served", [("a/handover", served), ("a/one-slot-fewer", fault)]),
        _record(
            "three", "converters", [("gguf", {"verdict": "equal", "difference": None, "ours": cost, "theirs": cost})]
        ),
        {"program": "four", "form": "saved", "version": None, "skipped": "it cannot be had", "cases": []},
        {"program": "five", "form": "saved", "version": None, "failed": "it ended with 1", "cases": []},
    ]
    page = format_table({"checks": json.loads(json.dumps(checks))})
    assert "| one 1 | `saved` | 2 on 2 bases | 2.0e-06 | 0.70 | – | 3 |" in page
    assert "| two 1 | `served` | 1 run | 0 of 1,000 answers wrong | – | – | 3 |" in page
    assert "| four | `saved` | not run here | – | – | – | – |" in page
    assert "| five | `saved` | failed | – | – | – | – |" in page
    assert "- one, rslora: it scales wrongly (off by up to 12)" in page
    assert "- two, one-slot-fewer: it is so (9 of 100 answers)" in page
    assert "| three | gguf | 1.5 s, 1,200 MB | 1.5 s, 1,200 MB |" in page
    assert page.count("three") == 1  # nothing was compared there


def _record(program: str, form: str, cases: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    listed = [{"key": key, **case} for key, case in cases]
    return {"program": program, "form": form, "version": f"{program} 1", "seconds": 3.2, "cases": listed}


def test_a_result_is_written_beside_those_of_other_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page, file = tmp_path / "page.md", tmp_path / "programs.json"
    page.write_text("# x\n<!-- programs: begin -->\n<!-- programs: end -->\n")
    monkeypatch.setattr(programs, "PAGE", page)
    monkeypatch.setattr(programs, "RESULT", file)
    old = {"verdict": "equal", "difference": 2e-6, "bound": 1e-4, "effect": 0.7}
    for record in (
        _record("two", "saved", [("a/plain", old)]),
        _record("one", "saved", [("a/plain", old)]),
        _record("two", "merged", [("a/plain", old)]),
        _record("two", "saved", [("a/plain", {**old, "difference": 3e-6}), ("b/plain", old)]),
    ):
        programs.write_record(dict(record))
    written = json.loads(file.read_text())
    assert [(each["program"], each["form"]) for each in written["checks"]] == [
        ("one", "saved"),
        ("two", "merged"),
        ("two", "saved"),
    ]
    assert [case["difference"] for case in written["checks"][2]["cases"]] == [3e-6, 2e-6]
    assert written["versions"]["lora-kit"]
    assert "| one 1 | `saved` | 1 on 1 base | 2.0e-06 |" in page.read_text()
    assert "| two 1 | `saved` | 2 on 2 bases | 3.0e-06 |" in page.read_text()


def test_a_printed_command_is_taken_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# x\n\n```sh\nrun --it \\\n  now\n```\n\n```python\nx = 1\n```\n")
    assert read_block(tmp_path, "sh") == "run --it \\\n  now\n"
    with pytest.raises(RuntimeError, match="0 blocks of yaml"):
        read_block(tmp_path, "yaml")


def test_the_cost_of_a_command_counts_its_children_and_nothing_else(tmp_path: Path) -> None:
    held = bytearray(128 << 20)  # of the process that measures
    held[::4096] = b"x" * len(held[::4096])
    assert run_measured(["true"]).megabytes < 60
    block = "b = bytearray(64 << 20); b[::4096] = b'x' * len(b[::4096])"
    cost = run_measured(["sh", "-c", f'python3 -c "{block}"'], folder=tmp_path)
    assert cost.megabytes > 60
    assert cost.seconds > 0
    with pytest.raises(RuntimeError, match="sh ended with 3: no such thing"):
        run_measured(["sh", "-c", "echo no such thing; exit 3"])
