"""The benchmarks' harness, and that no number on a page was typed."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks import encoder, harness, initialization, joint_training, plan_sizes, quality, tables
from benchmarks.harness import Case, Effort
from benchmarks.op_counts import kept, operations


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pages_say_what_the_results_say() -> None:
    for page, text in tables.pages().items():
        assert page.read_text(encoding="utf-8") == text, f"{page}: run python -m benchmarks --tables"


@pytest.mark.parametrize("suite", tables.SUITES)
def test_every_suite_has_a_short_form_and_a_page(suite: str) -> None:
    module = tables.suite(suite)
    assert any(row.form != "full" for row in module.rows().values())
    assert module.__doc__
    assert module.__doc__.split("\n")[0].endswith("?")
    assert f"[{suite}.py]({suite}.py)" in harness.README.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "module", [initialization, encoder, quality, joint_training, plan_sizes], ids=lambda module: module.__name__
)
def test_sections_of_other_questions_say_what_their_results_say(module: ModuleType) -> None:
    text = module.page(json.loads(module.RESULT.read_text(encoding="utf-8")))
    page = getattr(module, "PAGE", harness.README).read_text(encoding="utf-8")
    mark = module.__name__.rpartition(".")[2]
    assert harness.replace_marked(page, text, mark=mark) == page, f"run python -m {module.__name__} --table"


def test_a_case_is_divided_by_the_first_one_of_its_round() -> None:
    found = harness.timings({"floor": [1.0, 10.0, 100.0], "ours": [2.0, 20.0, 300.0]})
    assert found["floor"].ratio == 1
    assert (found["ours"].low, found["ours"].ratio, found["ours"].high) == (2.0, 2.0, 2.5)
    assert found["ours"].median == 20


def test_cases_take_turns_and_what_is_undone_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def call(name: str, seconds: float) -> None:
        calls.append(name)
        clock.now += seconds

    cases = {
        "a": Case(lambda: call("a", 1.0), after=lambda: call("undo", 50.0)),
        "b": lambda: call("b", 2.0),
    }
    found = harness.alternate(cases, rounds=2, warmup=0)
    assert calls == ["a", "undo", "b", "b", "a", "undo"]
    assert (found["a"].slowest, found["b"].slowest) == (1.0, 2.0)


def test_the_floor_is_measured_whatever_cases_are_asked_for() -> None:
    assert Effort(3, cases=("c",)).of(["a", "b", "c"]) == ["a", "c"]
    assert Effort(3).of(["a", "b"]) == ["a", "b"]


def test_rows_of_another_environment_or_another_name_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    harness.record("x", "old", {"value": 1}, rows=["old"])
    harness.record("x", "b", {"value": 2}, rows=["a", "b"])
    harness.record("x", "a", {"value": 3}, rows=["a", "b"])
    assert list(harness.read("x")["rows"].items()) == [("a", {"value": 3}), ("b", {"value": 2})]
    monkeypatch.setattr(harness, "environment", lambda: {"machine": "another", "versions": {}})
    harness.record("x", "b", {"value": 4}, rows=["a", "b"])
    assert harness.read("x")["rows"] == {"b": {"value": 4}}


def test_generated_text_replaces_what_stood_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: begin -->\nold\n<!-- table: end -->\nafter\n", encoding="utf-8")
    harness.fill(page, "new", mark="table")
    assert page.read_text(encoding="utf-8") == "before\n<!-- table: begin -->\nnew\n<!-- table: end -->\nafter\n"
    with pytest.raises(ValueError, match="no place for a generated speed"):
        harness.fill(page, "new", mark="speed")


def test_operations_that_compute_and_storages_that_are_kept_are_counted_once() -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(4, 8, requires_grad=True)
    with torch.no_grad():
        assert operations(lambda: (x @ weight.t()).view(-1)) == 1
    found = []
    # x is kept by both products, and once more as a view of itself; the weight is known.
    assert kept(lambda: found.append((x @ weight, x.view(4, 8) @ weight)), [weight]) == x.untyped_storage().nbytes()


@pytest.mark.slow
def test_the_peak_of_a_call_is_above_what_was_held_before() -> None:
    if torch.cuda.is_initialized():
        pytest.skip("counts the device's memory there")
    size = 64 << 20
    peak = harness.in_own_process(_peak, size, environment=harness.MEMORY_IN_USE)
    assert size <= peak < 1.2 * size


def _peak(size: int) -> int:
    held = torch.ones(size, dtype=torch.uint8)
    return harness.peak_bytes(lambda: held + 1)
