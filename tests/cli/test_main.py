"""The command line: verbs, exit codes, one line per error, and nothing that a terminal or its absence can break."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import lora_kit as lk
from lora_kit.cli.app import app, list_verbs
from lora_kit.cli.main import main
from lora_kit.doctor import CHECKS, NotHereError, examine
from lora_kit.errors import AdapterError, ConfigError, MergeError, StorageError, VerificationError
from lora_kit.io.text import escape_for_terminal
from tests.support import folders, texts, tiny

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a tiny base and a store of one adapter for it, and one for kit-base by name."""
    monkeypatch.chdir(tmp_path)
    model = tiny.llama()
    model.save_pretrained("base")
    texts.tokenizer().save_pretrained("base")
    config = lk.LoraConfig(r=2, lora_alpha=32, init_lora_weights=False, target_modules=("q_proj", "v_proj"))
    bank = lk.attach(model, config, name="sql")
    bank.save("sql", "adapters/sql", record={"recipe": {"data": {"separator": " => "}}, "metrics": {"perplexity": 2.5}})
    return tmp_path


def fails(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `lora-kit list` fail with this error."""

    def list_adapters(store: Path, *, verify: bool = False) -> None:
        raise error

    monkeypatch.setattr("lora_kit.adapter.store.list_adapters", list_adapters)


def only_line(text: str) -> str:
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    return text[:-1]


# Help and usage


@pytest.mark.parametrize("verb", list_verbs())
def test_every_verb_has_help(verb: str, capsys: Capture) -> None:
    assert main([verb, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: lora-kit {verb}")


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == lk.__version__


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = "import sys; from lora_kit.cli import main; main(['--help']); main(['generate', '--help'])\n"
    code += "sys.exit(bool({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["lst"],
        ["generate"],
        ["generate", "--prompt"],
        ["generate", "--prompt", "x", "--temperature", "warm"],
        ["list", "--jsn"],
        ["list", "a", "b"],
        ["merge", "--adapter", "x"],
        ["train"],
        ["train", "recipe.yaml", "stray"],
        ["train", "recipe.yaml"],
        ["train", "recipe.yaml", "--replace", "maybe"],
        ["inspect", "nobody"],
        ["list", "nowhere"],
        ["generate", "--prompt", "x", "--adapter", "nobody"],
        ["merge", "--adapter", "nobody", "--out", "merged"],
    ],
    ids=" ".join,
)
def test_what_was_given_wrong_is_one_line_and_code_2(here: Path, arguments: list[str], capsys: Capture) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert only_line(err).startswith("error: ")
    assert "Traceback" not in err


def test_a_wrong_verb_or_option_names_the_nearest(capsys: Capture) -> None:
    main(["lsit"])
    main(["list", "--jsno"])
    err = capsys.readouterr().err
    assert "'list'" in err
    assert "--json" in err


# Errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("r is 0", hint="give a rank"), 2),
        (MergeError("tied"), 2),
        (StorageError("full"), 3),
        (VerificationError("changed"), 4),
        (MemoryError(), 3),
        (PermissionError(13, "denied"), 3),
        (torch.OutOfMemoryError("no room"), 3),
        (ZeroDivisionError("oops\nsecond line"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_every_kind_of_failure_has_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, error: BaseException, code: int
) -> None:
    fails(monkeypatch, error)
    assert main(["list"]) == code
    assert only_line(capsys.readouterr().err).startswith("error: ")


def test_the_store_is_a_flag_of_list_as_of_the_other_verbs(tmp_path: Path, capsys: Capture) -> None:
    printed = []
    for given in ([str(tmp_path)], ["--store", str(tmp_path)]):
        assert main(["list", *given, "--json"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == "[]\n"


def test_hints_are_shown(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    fails(monkeypatch, ConfigError("r is 0", hint="give a rank"))
    main(["list"])
    assert only_line(capsys.readouterr().err) == "error: r is 0 (give a rank)"


def test_what_nobody_expected_names_its_class_and_the_way_to_see_more(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    fails(monkeypatch, ZeroDivisionError("oops\nsecond line"))
    main(["list"])
    assert only_line(capsys.readouterr().err) == "error: ZeroDivisionError: oops second line (run again with --debug)"


def test_a_list_of_misfits_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    fails(monkeypatch, AdapterError("it does not fit:\n  a is missing\n  b is none", hint="look"))
    assert main(["list"]) == 2
    assert only_line(capsys.readouterr().err) == "error: it does not fit: a is missing; b is none (look)"


@pytest.mark.parametrize("flag", ["--replace", "--force"])
def test_an_output_is_replaced_with_either_word(here: Path, flag: str, capsys: Capture) -> None:
    resize = ["resize", "sql", "--rank", "1", "--out", "adapters/two"]
    assert [main(resize), main(resize), main([*resize, flag])] == [0, 3, 0]


@pytest.mark.parametrize("arguments", [["list", "--debug"], ["--debug", "list"]])
def test_a_traceback_only_with_debug(monkeypatch: pytest.MonkeyPatch, capsys: Capture, arguments: list[str]) -> None:
    fails(monkeypatch, ConfigError("r is 0"))
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1] == "error: r is 0"


def test_names_of_others_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    fails(monkeypatch, ConfigError("bad \x1b]0;title\x07 \x9b2J \u202ename\r"))
    main(["list"])
    main(["inspect", "\x1b[2J", "--debug"])
    err = capsys.readouterr().err
    assert not set(err) & set("\x1b\x07\x9b\u202e\r")
    assert "\\x1b]0;title\\x07" in err
    assert "\\u202e" in err


def test_text_stays_text() -> None:
    for text in ("plain\n\ttext", "naïve Ünï", "日本語\u3000全角", "👩\u200d👩\u200d👧", "a\u00a0b"):
        assert escape_for_terminal(text) == text
    assert escape_for_terminal("\x00\x7f\ud800\u2066") == "\\x00\\x7f\\ud800\\u2066"


def test_sigterm_goes_through_the_cleanup_and_exits_143(monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned = []

    def list_adapters(store: Path, *, verify: bool = False) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleaned.append(store)

    monkeypatch.setattr("lora_kit.adapter.store.list_adapters", list_adapters)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["list"]) == 143
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) is before


# Where it runs


def test_a_reader_that_has_gone_stops_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        assert main(["list"]) == 0
        assert main(["merge", "--base", "base", "--adapter", "sql", "--out", "merged"]) == 0
        monkeypatch.undo()
    assert (here / "merged" / "config.json").exists()


def test_closed_streams_stop_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["list"]) == 0
    assert main(["inspect", "nobody"]) == 2
    monkeypatch.undo()


def test_a_disk_that_is_full_behind_stdout_is_the_machine(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    # With a console of its own: what cannot be written stays in it.
    monkeypatch.setattr(app, "_console", Console())
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["--version"]) == 3
        monkeypatch.undo()
        full.buffer.raw.close()  # type: ignore[attr-defined]
    assert "No space left" in only_line(capsys.readouterr().err)


def test_an_ascii_locale_escapes_instead_of_failing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["inspect", "sql"]) == 0
    stream.seek(0)
    assert "q_proj" in stream.read()
    monkeypatch.undo()


def test_outside_the_main_thread_it_works_too(here: Path, capsys: Capture) -> None:
    import threading

    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["list"])))
    thread.start()
    thread.join()
    assert codes == [0]


# Verbs


def test_list_shows_good_and_broken(here: Path, capsys: Capture) -> None:
    (here / "adapters" / "torn").mkdir()
    (here / "adapters" / "torn" / "adapter_config.json").write_text("{", encoding="utf-8")
    assert main(["list"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["adapter", "rank", "alpha", "targets", "base", "size", "metrics", "digest", "state"]
    assert rows[0].startswith("sql")
    assert rows[0].endswith("good")
    assert "perplexity 2.5" in rows[0]
    assert rows[1].startswith("torn")
    assert "broken: " in rows[1]
    assert main(["list", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["sql", "torn"]


def test_an_empty_store_says_so(here: Path, capsys: Capture) -> None:
    (here / "empty").mkdir()
    assert main(["list", "empty"]) == 0
    assert capsys.readouterr().out == "no adapters in empty\n"
    assert main(["list", "empty", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_inspect_shows_layers_and_identity(here: Path, capsys: Capture) -> None:
    assert main(["inspect", "sql"]) == 0
    out = capsys.readouterr().out
    assert lk.Adapter.load("adapters/sql").digest in out
    assert "model.layers.1.self_attn.v_proj" in out
    assert main(["inspect", "adapters/sql", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 4


def test_generate_alone_prints_only_the_text(here: Path, capsys: Capture) -> None:
    from lora_kit.generation.decoding import Sampling
    from lora_kit.generation.generate import generate

    arguments = ["generate", "--base", "base", "--adapter", "sql", "--prompt", "one", "--max-new-tokens", "6"]
    assert main(arguments) == 0
    expected = generate("base", ["sql"], "one", sampling=Sampling(max_new_tokens=6))[0]
    assert expected.prompt == "one => "
    assert capsys.readouterr().out == expected.text + "\n"


def test_generate_shows_rows_side_by_side(here: Path, capsys: Capture) -> None:
    arguments = [
        "generate",
        "--base",
        "base",
        "-a",
        "sql",
        "-a",
        "adapters/sql",
        "--compare",
        "--prompt",
        "one",
        "--raw",
    ]
    assert main([*arguments, "--max-new-tokens", "4"]) == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--- ")]
    assert heads == ["--- base", "--- sql", "--- sql"]


def test_generate_draws_panels_on_a_terminal(here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    arguments = ["generate", "--base", "base", "-a", "sql", "--compare", "--prompt", "one", "--max-new-tokens", "4"]
    assert main(arguments) == 0
    last = capsys.readouterr().out.splitlines()[-8:]
    assert any("─ base ─" in line for line in last)
    assert any("─ sql ─" in line for line in last)


def test_generate_says_when_the_context_ends(here: Path, capsys: Capture) -> None:
    assert main(["generate", "--base", "base", "--prompt", "a" * 62]) == 0
    err = capsys.readouterr().err
    assert not err or "the context of the base is full" in err


def test_generate_does_not_fetch_a_base_that_an_adapter_names(here: Path, capsys: Capture) -> None:
    assert main(["generate", "--adapter", "sql", "--prompt", "one"]) == 2
    assert "--base" in only_line(capsys.readouterr().err)


def test_merge_writes_a_model_and_says_what_survived(here: Path, capsys: Capture) -> None:
    assert main(["merge", "--base", "base", "--adapter", "sql", "--out", "merged"]) == 0
    out = capsys.readouterr().out
    assert "survived" in out
    assert main(["generate", "--base", "merged", "--prompt", "one", "--max-new-tokens", "2"]) == 0
    assert main(["merge", "--base", "base", "--adapter", "sql", "--out", "merged"]) == 3
    capsys.readouterr()
    assert main(["merge", "--base", "base", "--adapter", "sql", "--out", "merged", "--replace", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["retention"] > 0.99
    assert main(["merge", "--base", "base", "--adapter", "sql", "--out", "half", "--dtype", "float99"]) == 2
    assert not (here / "half").exists()


def test_train_takes_flags_over_the_recipe(here: Path, capsys: Capture) -> None:
    rows = [{"prompt": f"say {letter}", "completion": letter} for letter in "abcdefgh"]
    texts.write(here / "rows.jsonl", rows)
    recipe = "base: base\ndata: rows.jsonl\nout: adapters/letters\nlora: {r: 2}\ntrain: {max_steps: 50}\n"
    (here / "recipe.yaml").write_text(recipe, encoding="utf-8")
    flags = ["--lora.r", "3", "--train.max-steps=2", "--train.learning_rate", "1e-3", "--data.validation", "rows.jsonl"]
    assert main(["train", "recipe.yaml", *flags]) == 0
    plan, *table = capsys.readouterr().out.splitlines()
    assert "r=3" in plan
    assert "2 steps" in plan
    assert any(line.startswith("validation perplexity") for line in table)
    adapter = lk.Adapter.load("adapters/letters")
    assert adapter.config.r == 3
    assert main(["train", "recipe.yaml", *flags]) == 3
    capsys.readouterr()
    assert main(["train", "recipe.yaml", *flags, "--replace", "--lora.r=1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["out"], report["steps"], report["after"].keys()) == ("adapters/letters", 2, report["before"].keys())
    assert report["digest"] == lk.Adapter.load("adapters/letters").digest
    assert lk.Adapter.load("adapters/letters").config.r == 1
    assert main(["train", "recipe.yaml", "--lora.rnk", "3"]) == 2
    assert "lora.rnk" in capsys.readouterr().err


def test_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("lora_kit.demo.demo.run", given.update, raising=False)
    assert main(["demo", "--out", "elsewhere", "--seed", "3"]) == 0
    assert given["out"] == Path("elsewhere")
    assert given["seed"] == 3


# Doctor


@pytest.mark.parametrize("name", [name for name in CHECKS if name != "torch.compile"])
def test_what_should_work_works_here(name: str, here: Path) -> None:
    (check,) = examine({name: CHECKS[name]}).checks
    assert check.state in ("good", "not here"), check.note
    assert check.seconds >= 0


def test_doctor_reports_failures_and_exits_4(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def broken() -> str:
        raise RuntimeError("it \x1b[31mbroke\nbadly")

    def absent() -> str:
        raise NotHereError("no such device")

    checks = {"fine": lambda: "quite", "broken": broken, "absent": absent}
    monkeypatch.setattr("lora_kit.doctor.CHECKS", checks)
    assert main(["doctor", "--json"]) == 4
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [check["state"] for check in found["checks"]] == ["good", "failed", "not here"]
    assert found["checks"][1]["note"] == "RuntimeError: it \\x1b[31mbroke"
    assert found["facts"]["torch"] == torch.__version__
    assert "broken" in only_line(err)
    monkeypatch.setattr("lora_kit.doctor.CHECKS", {"fine": lambda: "quite"})
    assert main(["doctor"]) == 0
    assert "quite" in capsys.readouterr().out


def test_a_warning_is_shown_once_and_is_an_error_with_strict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders.foreign(tmp_path / "theirs")
    assert main(["inspect", "./theirs"]) == 0
    assert capsys.readouterr().err.count("neither its files nor the base") == 1
    assert main(["inspect", "./theirs", "--strict"]) == 4
    shown = capsys.readouterr()
    assert "without --strict this is a warning" in shown.err
    assert shown.out == ""
    (tmp_path / "theirs" / "adapter_model.bin").write_bytes(b"other")
    assert main(["inspect", "./theirs"]) == 0
    assert "adapter_model.bin too, which is not read" in capsys.readouterr().err
