"""`combine`, `resize`, `extract`, `compare`: what they take, what they print, what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import lora_kit as lk
from lora_kit.cli.main import main
from tests.support import tiny
from tests.support.folders import adapter, contents

Capture = pytest.CaptureFixture[str]
MIX = ["combine", "--adapter", "one", "--weight", "0.7", "--adapter", "two", "--weight=-0.3", "--out"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a store of two adapters."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("one", "two")):
        adapter(seed=seed).save(tmp_path / "adapters" / name)
    return tmp_path


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    return code, *capsys.readouterr()


def test_a_mix_is_made_cut_down_and_compared(here: Path, capsys: Capture) -> None:
    code, out, _ = run(capsys, *MIX, "adapters/mix")
    assert code == 0
    assert "adapters/mix" in out
    made = lk.Adapter.load("adapters/mix")
    assert (made.config.r, made.record["made"]["method"]) == (8, "cat")

    code, out, err = run(capsys, "resize", "mix", "--rank", "3", "--out", "adapters/small", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["ranks"] == [3]
    assert told["made"]["error"]["share"] > 0.01
    assert told["digest"] == lk.Adapter.load("adapters/small").digest

    code, out, _ = run(capsys, "compare", "one", "mix")
    assert code == 0
    assert "cosine of all updates" in out
    assert "model.layers.0.self_attn.q_proj" in out
    code, out, _ = run(capsys, "compare", "one", "mix", "--json")
    assert json.loads(out)["configs"]["r"] == [4, 8]


def test_linear_warns_and_says_how_far_off_it_is(here: Path, capsys: Capture) -> None:
    code, out, err = run(capsys, *MIX, "mix", "--method", "linear")
    assert code == 0
    assert "'linear' is not the sum of the adapters" in err
    assert "of the exact result" in out


def test_an_output_that_is_there_is_replaced_only_if_asked(here: Path, capsys: Capture) -> None:
    shutil.copytree(here / "adapters" / "two", here / "adapters" / "third")
    before = contents(here / "adapters")
    code, _, err = run(capsys, *MIX, "adapters/third")
    assert (code, "exists already" in err) == (3, True)
    code, _, err = run(capsys, "resize", "two", "--rank", "1", "--out", "adapters/third")
    assert (code, "exists already" in err) == (3, True)
    code, _, err = run(capsys, *MIX, "adapters/one", "--replace")
    assert (code, "is an input" in err) == (3, True)
    assert contents(here / "adapters") == before
    assert run(capsys, *MIX, "adapters/third", "--replace")[0] == 0
    assert lk.Adapter.load("adapters/third").config.r == 8


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["combine", "--adapter", "one", "--out", "x"], "weight"),
        (["combine", "--adapter", "one", "--weight", "1", "--weight", "2", "--out", "x"], "one --weight for each"),
        ([*MIX, "x", "--method", "average"], "method 'average' is not known"),
        ([*MIX, "x", "--method", "ties"], "'ties' needs a density"),
        (["combine", "--adapter", "on", "--weight", "1", "--out", "x"], "did you mean 'one'?"),
        (["resize", "one", "--out", "x"], "exactly one is expected"),
        (["resize", "one", "--energy", "2", "--out", "x"], "energy=2.0"),
        (["extract", "--base", "nowhere", "--tuned", "kit-base", "--rank", "4", "--out", "x"], "no such folder"),
        (["compare", "one", "three"], "no adapter is called 'three'"),
    ],
)
def test_bad_requests_are_one_line(here: Path, capsys: Capture, arguments: list[str], told: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1
    assert not Path("x").exists()


def test_a_full_fine_tune_becomes_an_adapter(here: Path, capsys: Capture) -> None:
    tiny.llama().save_pretrained("base")
    tuned = tiny.llama()
    tuned.model.layers[0].self_attn.q_proj.weight.data[3, 5] += 0.5
    tuned.model.norm.weight.data += 0.1
    tuned.save_pretrained("tuned")
    arguments = ["extract", "--base", "base", "--tuned", "tuned", "--rank", "1"]
    code, out, err = run(capsys, *arguments, "--out", "taken")
    assert code == 0
    assert "model.norm.weight" in err
    assert "model.norm.weight" in out
    found = lk.Adapter.load("taken")
    assert list(found.pairs()) == ["model.layers.0.self_attn.q_proj"]
    assert found.config.base_model_name_or_path == "base"
    code, out, err = run(capsys, *arguments, "--others", "save", "--out", "whole")
    assert (code, err) == (0, "")
    assert list(lk.Adapter.load("whole").saved()) == ["model.norm.weight"]
