"""The encoding of a file that does not say it: found out where nothing speaks against it, else a fault of its rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_kit.data.encodings import detect_encoding
from lora_kit.data.rows import scan_rows
from lora_kit.errors import DataError

GERMAN = "Stra\u00dfe, \u201esagte\u201c er \u2013 \u00c4rger f\u00fcr M\u00fcller: 5 \u20ac, 3\u00b0, caf\u00e9s."
POLISH = "Za\u017c\u00f3\u0142\u0107 g\u0119\u015bl\u0105 ja\u017a\u0144, mia\u0142a ba\u015b\u0144"
RUSSIAN = "\u041f\u0440\u0438\u0432\u0435\u0442, \u043a\u0430\u043a \u0434\u0435\u043b\u0430?"


@pytest.mark.parametrize(
    ("text", "encoding", "expected"),
    [
        ("plain", "ascii", "utf-8"),
        (GERMAN, "utf-8", "utf-8"),
        (GERMAN, "utf-8-sig", "utf-8"),
        (GERMAN, "utf-16", "utf-16"),
        (GERMAN, "cp1252", "cp1252"),
        (RUSSIAN, "utf-8", "utf-8"),
        # Single bytes that are something else: nothing is guessed, the rows are faults.
        (RUSSIAN, "cp1251", "utf-8"),
        (POLISH, "cp1250", "utf-8"),
        (POLISH, "iso8859-2", "utf-8"),
        ("Stra\u00dfen f\u00fcr M\u00fcller und caf\u00e9s", "mac-roman", "utf-8"),
        ("\u65e5\u672c\u8a9e\u306e\u6587\u7ae0", "shift-jis", "utf-8"),
        ("caf\u00e9 " * 9 + "\0", "cp1252", "utf-8"),
    ],
)
def test_an_encoding_is_found_or_left_alone(text: str, encoding: str, expected: str) -> None:
    assert detect_encoding(text.encode(encoding)) == expected


def test_a_text_of_two_encodings_is_not_guessed(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b"text\n" + "caf\u00e9\n".encode() + "M\u00fcller\n".encode("cp1252"))
    scan = scan_rows(file, encoding="auto")
    assert (scan.encoding, scan.rows.values, [fault.line for fault in scan.faults]) == ("utf-8", (("caf\u00e9",),), [3])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.txt"])
def test_every_kind_of_text_is_read_in_its_encoding(tmp_path: Path, encoding: str, name: str) -> None:
    text = {"rows.jsonl": f'{{"text": "{GERMAN}"}}\n', "rows.txt": GERMAN}.get(name, f'text\n"{GERMAN}"\n')
    (tmp_path / name).write_bytes(text.encode(encoding))
    scan = scan_rows(tmp_path / name, encoding="auto")
    assert (scan.rows.values, scan.faults) == (((GERMAN,),), ())
    assert scan.encoding == encoding.removesuffix("-sig")


def test_a_recipe_guesses_nothing(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_bytes(GERMAN.encode("utf-16"))
    with pytest.raises(DataError, match=r"not UTF-8.*--encoding utf-16"):
        scan_rows(tmp_path / "rows.txt")
