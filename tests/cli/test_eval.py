"""`eval`: a table, JSON, a file of what was said, and one line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

import lora_kit as lk
from lora_kit.cli.eval import _show_eval_report
from lora_kit.cli.main import main
from lora_kit.evaluation.eval_report import EvalReport, Result
from tests.support import texts, tiny

Capture = pytest.CaptureFixture[str]
ROWS = [
    {"prompt": "one", "completion": "two"},
    {"prompt": "b", "completion": "c d"},
    {"prompt": "one", "completion": "three"},
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a tiny base, two adapters of different separators, and rows."""
    monkeypatch.chdir(tmp_path)
    tiny.llama().save_pretrained("base")
    texts.tokenizer().save_pretrained("base")
    for name, separator in (("one", " -> "), ("two", "\n")):
        config = lk.LoraConfig(r=2, lora_alpha=32, init_lora_weights=False, target_modules=("q_proj", "v_proj"))
        bank = lk.attach(tiny.llama(), config, name=name)
        bank.save(name, f"adapters/{name}", record={"recipe": {"data": {"separator": separator}}})
    texts.write(tmp_path / "test.jsonl", ROWS)
    return tmp_path


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    code = main(["eval", "--base", "base", "--data", "test.jsonl", *arguments])
    return code, *capsys.readouterr()


def test_adapters_stand_in_one_table_with_the_base(here: Path, capsys: Capture) -> None:
    code, out, err = run(capsys, "--adapter", "one", "--adapter", "two", "--compare")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["loss", "perplexity"]
    assert [line[0] for line in lines[1:4]] == ["base", "one", "two"]
    found = lk.evaluate("base", [None, "one", "two"], "test.jsonl")
    assert [line[1] for line in lines[1:4]] == [f"{each.metrics['loss']:.4f}" for each in found.results]
    assert "3 rows of test.jsonl" in out
    # Where there is no terminal, each result is a line on stderr as it comes.
    assert [line.split(":")[0] for line in err.splitlines()] == ["base", "one", "two"]


def test_json_can_be_read_by_a_machine(here: Path, capsys: Capture) -> None:
    code, out, _ = run(capsys, "-a", "one", "--metrics", "loss,exact_match", "--json", "--max-new-tokens", "4")
    assert code == 0
    found = json.loads(out)
    assert (found["task"], found["rows"], found["data"]) == ("causal-lm", 3, "test.jsonl")
    [result] = found["results"]
    assert (result["name"], set(result["metrics"])) == ("one", {"loss", "exact_match"})
    assert result["digest"] == lk.Adapter.load("adapters/one").digest


def test_what_was_said_is_written_row_by_row(here: Path, capsys: Capture) -> None:
    arguments = ["-a", "one", "-a", "two", "--metrics", "exact_match", "--out", "said.jsonl"]
    code, out, err = run(capsys, *arguments)
    assert code == 0
    assert "3 rows, 2 prompts of test.jsonl" in out
    assert "written: said.jsonl" in out
    lines = [json.loads(line) for line in Path("said.jsonl").read_text().splitlines()]
    assert [(line["lines"], line["given"], line["expected"]) for line in lines] == [
        ([1, 3], "one", ["two", "three"]),
        ([2], "b", ["c d"]),
    ]
    assert all(set(line["said"]) == {"one", "two"} for line in lines)
    code, _, err = run(capsys, *arguments)
    assert (code, "said.jsonl exists" in err) == (3, True)
    assert run(capsys, *arguments, "--replace")[0] == 0
    assert sorted(path.name for path in here.iterdir()) == ["adapters", "base", "said.jsonl", "test.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-a", "one", "--metrics", "exact_mach"], "did you mean 'exact_match'?"),
        (["-a", "one", "--metrics", "f1"], "does not fit task causal-lm"),
        (["-a", "one", "--metrics", ","], "--metrics was given without a name"),
        (["-a", "one", "--out", "said.jsonl"], "ask for exact_match too"),
        (["-a", "one", "--metrics", "bleu", "--out", "no/said.jsonl"], "no is not a folder"),
        (["-a", "nobody"], "nobody"),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_line(here: Path, capsys: Capture, arguments: list[str], told: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert code in (2, 3)
    assert (out, err.count("\n")) == ("", 1)
    assert told in err


def test_texts_that_were_cut_off_are_told(here: Path, capsys: Capture) -> None:
    _, _, err = run(capsys, "-a", "one", "--metrics", "bleu", "--max-new-tokens", "1")
    assert "2 of 2 texts of one were cut off; raise --max-new-tokens" in err


def test_labels_from_training_are_known_without_being_told(here: Path, capsys: Capture) -> None:
    config = tiny.bert().config
    transformers.BertModel(config).save_pretrained("encoder")
    texts.bert_tokenizer().save_pretrained("encoder")
    rows = [{"text": word * n, "label": label} for word, label in (("good ", "y"), ("bad ", "n")) for n in (1, 2, 3)]
    texts.write(here / "labeled.jsonl", rows)
    recipe = {"base": "encoder", "task": "classify", "out": "adapters/mood", "train": {"max_steps": 8}}
    report = lk.train({**recipe, "data": {"train": "labeled.jsonl", "validation": "labeled.jsonl"}})
    capsys.readouterr()
    assert main(["eval", "--base", "encoder", "-a", "mood", "--data", "labeled.jsonl", "--json"]) == 0
    [result] = json.loads(capsys.readouterr().out)["results"]
    assert report.after is not None
    assert result["metrics"]["loss"] == pytest.approx(report.after.loss, rel=1e-5)
    assert set(result["metrics"]) == {"loss", "accuracy", "f1"}
    # A base without a head of its own knows no labels.
    assert main(["eval", "--base", "encoder", "--data", "labeled.jsonl"]) == 2
    assert "label 'y' is not one of LABEL_0, LABEL_1, LABEL_2" in capsys.readouterr().err


def test_labels_that_a_file_does_not_have_are_counted_below_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"f1_macro": 1.0, "f1[a]": 1.0, "f1[b]": float("nan")}
    one = Result(name="one", digest=None, metrics=metrics, said=(), misses=(), unended=0)
    report = EvalReport(data=Path("rows.jsonl"), task="classify", rows=3, seconds=1.0, results=(one,), cases=())
    _show_eval_report(report, None, None, iter(()))
    assert "1 label is neither in this file nor predicted, and so without F1" in capsys.readouterr().out
