"""`lora-kit merge`: what it takes, what it prints, and the bar that only a terminal sees."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch

import lora_kit as lk
from lora_kit.cli.main import main
from lora_kit.cli.merge import show_bytes_bar
from tests.support import merging, tiny

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a base of tied weights and a store of adapters for it."""
    monkeypatch.chdir(tmp_path)
    base = merging.base_folder(tmp_path / "base", tiny.llama(tie=True, dtype=torch.bfloat16))
    for name, fields in {
        "sql": {"target_modules": ["q_proj", "v_proj"]},
        "tone": {"target_modules": ["q_proj"], "r": 2},
        "words": {"target_modules": ["embed_tokens"]},
        "faint": {"target_modules": ["q_proj"], "lora_alpha": 1e-3},
    }.items():
        merging.adapter_folder(base, tmp_path / "adapters" / name, **fields)
    return tmp_path


def merged(*arguments: str) -> int:
    return main(["merge", "--base", "base", "--out", "merged", *arguments])


def test_several_adapters_are_merged_with_their_weights(here: Path, capsys: Capture) -> None:
    assert merged("--adapter", "sql", "--adapter", "tone", "--weight", "0.7", "--weight=-0.3") == 0
    out = capsys.readouterr().out
    assert "x 0.7" in out
    assert "x -0.3" in out
    record = json.loads((here / "merged" / "lora_kit_merge.json").read_text())
    wanted = [lk.Adapter.load(here / "adapters" / name).digest for name in ("sql", "tone")]
    assert record["adapters"] == dict(zip(wanted, (0.7, -0.3), strict=True))


def test_every_adapter_has_a_weight_or_none_has(here: Path, capsys: Capture) -> None:
    assert merged("--adapter", "sql", "--adapter", "tone", "--weight", "1") == 2
    assert "2 adapters and 1 weights" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_logits_are_compared_where_that_is_asked_for(capsys: Capture) -> None:
    assert merged("--adapter", "sql", "--verify", "logits") == 0
    assert "bound" in capsys.readouterr().out
    assert merged("--adapter", "sql", "--verify", "hope", "--replace") == 2


def test_what_is_refused_says_how_to_allow_it(here: Path, capsys: Capture) -> None:
    for name, allowance in {"words": "untie", "faint": "lost-delta"}.items():
        assert merged("--adapter", name) == 2
        assert allowance in capsys.readouterr().err
        assert not (here / "merged").exists()
        assert merged("--adapter", name, "--allow", allowance, "--json") == 0
        report = json.loads(capsys.readouterr().out)
        assert bool(report["untied"]) == (name == "words")
        assert (report["retention"] < 0.5) == (name == "faint")
        for file in (here / "merged").iterdir():
            file.unlink()
        (here / "merged").rmdir()


def test_a_bar_is_drawn_on_a_terminal_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    for stream, drawn in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with show_bytes_bar("merging") as progress:
            progress(500_000, 1_000_000)
        assert ("0.5/1.0 MB" in stream.getvalue()) == drawn
        assert bool(stream.getvalue()) == drawn
