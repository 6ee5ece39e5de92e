"""Faults of rows: conversations, labels, columns, files of data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lora_kit.data.preparation.prepare import prepare
from lora_kit.data.rows import read_rows
from lora_kit.errors import DataError, LoraKitError
from tests.faults.fault import Act, Fault
from tests.support import texts

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yo"}


LABELED = ({"text": "a", "label": "x"}, {"text": "b", "label": "y"})


def _rows(*rows: Mapping[str, Any]) -> Act:
    return lambda folder: texts.write(folder / "rows.jsonl", rows)


def _text(text: bytes, name: str = "rows.jsonl") -> Act:
    return lambda folder: (folder / name).write_bytes(text)


def _talk(*messages: Mapping[str, Any], **more: Any) -> Act:
    return _rows({"messages": list(messages), **more})


def _read(folder: Path) -> None:
    read_rows(folder / next(path.name for path in folder.iterdir() if path.name.startswith("rows.")))


def _pack_parquet(folder: Path) -> None:
    """10 kB that unpack to 600 MB."""
    table = pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0] * 600), pa.array(["x" * 2**20]))})
    pq.write_table(table, folder / "rows.parquet", compression="zstd", use_dictionary=True)


def _many_columns(folder: Path) -> None:
    names = ",".join(f"c{number}" for number in range(200_000))
    (folder / "rows.csv").write_text(f"{names}\n" + "," * 199_999 + "\n")


def _long_cell(folder: Path) -> None:
    (folder / "rows.csv").write_text(f'text,label\n"{"x" * 30_000_000}",a\n')


def _prepare_dialogues(folder: Path) -> None:
    """Sixty dialogues that begin alike are no sixty copies of one."""
    system = {"role": "system", "content": "be kind"}
    rows = [
        {
            "messages": [
                system,
                USER,
                ANSWER,
                {"role": "user", "content": f"n {n}"},
                {"role": "assistant", "content": f"m {n}"},
            ]
        }
        for n in range(60)
    ]
    texts.write(folder / "rows.jsonl", rows)
    found = prepare(folder / "rows.jsonl", folder / "prepared", template="plain")
    assert len(found.train) + len(found.validation or ()) == 60


def _row(name: str, make: Act, says: str = "", *, error: type[LoraKitError] | None = DataError, **more: Any) -> Fault:
    command = ("prepare", "rows.jsonl", "--base", "base", "--out", "prepared")
    return Fault(
        name=name, make=make, error=error, says=says, **{"act": _read, "command": command if error else (), **more}
    )


CALL = {"type": "function", "function": {"name": "f", "arguments": '{"n": 1}'}}
DATA: tuple[Fault, ...] = (
    _row("a key of a message that means something", _talk(USER, {**ANSWER, "wieght": 0}), "wieght"),
    _row("an answer that is not to be learned", _talk(USER, ANSWER, USER, {**ANSWER, "train": False}), error=None),
    _row("no answer that is to be learned", _talk(USER, {**ANSWER, "weight": 0}), "nothing to learn"),
    _row("thoughts of an answer", _talk(USER, {**ANSWER, "reasoning_content": "hm"}), error=None),
    _row(
        "calls of tools",
        _talk(
            USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "4"}, ANSWER
        ),
        error=None,
    ),
    _row(
        "arguments of a call that are no JSON",
        _talk(
            USER,
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{"}}]},
            {"role": "tool", "content": "4"},
            ANSWER,
        ),
        "",
    ),
    _row("a role that nobody knows", _talk(USER, {"role": "asistant", "content": "x"}), "asistant"),
    _row("an empty conversation", _talk(), ""),
    _row("a conversation without an answer", _talk(USER), ""),
    _row("prompts and completions of messages", _rows({"prompt": [USER], "completion": [ANSWER]}), error=None),
    _row("dialogues that begin alike", lambda folder: None, error=None, act=_prepare_dialogues, writes=True),
    _row("several labels", _rows({"text": "a", "labels": ["x", "y"]}, {"text": "b", "labels": []}), error=None),
    _row("numbers as labels", _rows({"text": "a", "label": 0.5}, {"text": "b", "label": 2}), error=None),
    _row("labels of two types", _rows(*LABELED, {"text": "c", "label": 1}), ":3"),
    _row(
        "a column that says what is learned, and is not read",
        _rows({"prompt": "a", "completion": "b", "labels": [1]}),
        "labels",
    ),
    _row("no JSON", _text(b"{"), "1"),
    _row("lists as rows", _text(b"[1]\n[2]\n"), ""),
    _row(
        "not UTF-8",
        _text(b'{"text": "\xfc", "label": "a"}\n{"text": "a", "label": "b"}\n{"text": "b", "label": "a"}\n'),
        "UTF-8",
        command=(),
    ),
    _row("nested 100,000 deep", _text(b'{"text":' * 100_000), ""),
    _row("half of a surrogate pair", _text(b'{"text": "\\ud800", "label": "a"}\n'), ""),
    _row("a number of 5,000 digits", _text(b'{"text": "a", "label": ' + b"9" * 5_000 + b"}\n"), ""),
    _row("an empty file", _text(b""), "no rows"),
    _row("empty texts", _rows({"prompt": " ", "completion": "\n"}), "empty"),
    _row(
        "Parquet that unpacks to 600 MB",
        _pack_parquet,
        "",
        command=("prepare", "rows.parquet", "--base", "base", "--out", "prepared"),
    ),
    _row(
        "Parquet cut short",
        _text(b"PAR1xxxxPAR1", "rows.parquet"),
        "",
        command=("prepare", "rows.parquet", "--base", "base", "--out", "prepared"),
    ),
    _row("200,000 columns", _many_columns, "columns", command=()),
    _row("a cell of 30 MB", _long_cell, "", command=(), slow=True),
    _row(
        "a table whose columns repeat",
        _text(b"text,text\na,b\n", "rows.csv"),
        "twice",
        command=("prepare", "rows.csv", "--base", "base", "--out", "prepared"),
    ),
    _row("keys of no layout", _rows({"a": 1, "b": 2}), "the first row has the keys a, b"),
)
