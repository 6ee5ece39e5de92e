"""`--help` as people read it: every flag with what it does, filled to the width of the terminal."""

from __future__ import annotations

from itertools import pairwise

import pytest

from lora_kit.cli.main import main
from tools.docs_reference import arguments, names_of, verbs

Capture = pytest.CaptureFixture[str]


def help_of(verb: str, capsys: Capture) -> str:
    assert main([verb, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", verbs())
def test_help_says_what_every_argument_does(verb: str, capsys: Capture) -> None:
    told = " ".join(help_of(verb, capsys).split())
    for argument in arguments(verb):
        assert argument.parameter.help, f"{verb}: nothing is said of {argument.names}"
        assert " ".join(argument.parameter.help.split()) in told
        assert all(name in told for name in names_of(argument))


@pytest.mark.parametrize("verb", verbs())
@pytest.mark.parametrize("width", [60, 80, 200])
def test_help_is_filled_to_the_width_of_the_terminal(
    verb: str, width: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = help_of(verb, capsys).splitlines()
    assert max(map(len, lines)) <= width
    for line, following in pairwise(lines):
        if goes_on(line, following):
            assert len(line) + 1 + len(following.split()[0]) > min(width, 100), f"{line!r} is broken too early"


def goes_on(line: str, following: str) -> bool:
    """Whether a line is the rest of the one before it."""
    if following.startswith(" "):
        return following.startswith("      ")
    return bool(following and line) and not line.startswith(" ") and not line.endswith(":")


def test_help_does_not_say_that_a_flag_is_off(capsys: Capture) -> None:
    assert "False" not in help_of("generate", capsys)
    assert "[default: 128]" in help_of("generate", capsys)
    assert "[required]" in help_of("generate", capsys)
