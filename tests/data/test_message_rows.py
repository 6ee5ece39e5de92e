"""Files with one message in a row, and roles as people write them: `prepare` makes conversations of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_kit.data.message_rows import join_message_rows
from lora_kit.data.preparation.prepare import prepare
from lora_kit.data.records import Record
from lora_kit.data.rows import read_rows
from lora_kit.errors import DataError
from lora_kit.names import KIT_BASE

TURNS = [("c1", "customer", "hi"), ("c2", "customer", "ho"), ("c1", "agent", "hello"), ("c2", "agent", "hey")]


def records(rows: list[tuple[Any, ...]], names: str = "conversation_id role content") -> list[Record]:
    """Return rows as a CSV file has them: the header is line 1."""
    return [(line, dict(zip(names.split(), row, strict=True))) for line, row in enumerate(rows, start=2)]


def said(record: Record) -> list[tuple[str, str]]:
    messages: Any = record[1]["messages"]
    return [(message["role"], message["content"]) for message in messages]


def test_messages_of_one_conversation_keep_their_order_between_others() -> None:
    found = join_message_rows(records(TURNS))
    assert [line for line, _ in found.records] == [2, 3]
    assert [*map(said, found.records)] == [
        [("user", "hi"), ("assistant", "hello")],
        [("user", "ho"), ("assistant", "hey")],
    ]
    assert found.joined_by == "conversation_id"
    assert not found.faults
    assert found.roles == {"customer": "user", "agent": "assistant"}


@pytest.mark.parametrize("names", ["thread from value", "ChatID speaker text", "session_id sender message"])
def test_columns_have_the_names_that_people_give_them(names: str) -> None:
    found = join_message_rows(records([(1, "Human", "a"), (1, "GPT", "b")], names))
    assert [*map(said, found.records)] == [[("user", "a"), ("assistant", "b")]]


@pytest.mark.parametrize(
    ("rows", "names", "line", "what"),
    [
        ([("c", "user", "a"), ("c", "user", "b")], "", 3, "from the user, as that of line 2"),
        ([("c", "user", "a", 2), ("c", "bot", "b", 1)], " turn", 3, "turn is 1, and 2 in line 2"),
        ([("c", "user", "a"), ("c", "narrator", "b")], "", 3, "role is 'narrator'"),
        ([("c", "user", "a"), ("c", "agent", "b")], "", 3, "role is 'agent'"),
        ([("c", "user", "a"), ("", "bot", "b")], "", 3, "conversation_id is empty"),
    ],
)
def test_messages_that_make_no_conversation_are_faults_of_their_line(
    rows: list[tuple[Any, ...]], names: str, line: int, what: str
) -> None:
    found = join_message_rows(
        records([*rows, *[("d", "user", "a", 1)[: len(rows[0])]]], f"conversation_id role content{names}")
    )
    (fault,) = found.faults
    assert fault.line == line
    assert what in fault.what


def test_other_files_stay_as_they_are() -> None:
    for names in ("role content text", "conversation_id role content label", "prompt completion chat_id"):
        rows = records([("a", "b", "c", "d")[: len(names.split())]], names)
        assert join_message_rows(rows).records == rows


def test_prepare_writes_conversations_and_says_what_it_changed(tmp_path: Path) -> None:
    file = tmp_path / "log.csv"
    lines = [
        f"{number},{role},{text} {number},x" for number in range(6) for role, text in (("user", "a"), ("Bot", "b"))
    ]
    file.write_text("\n".join(["chat_id,role,content,time", *lines]), "utf-8")
    (part,) = prepare(file, tmp_path / "out", base=KIT_BASE).parts
    assert (part.examined.joined_by, part.examined.roles) == ("chat_id", {"Bot": "assistant"})
    assert part.examined.unused == ("time",)
    conversation = read_rows(tmp_path / "out" / "train.jsonl").values[0][0]
    assert [message.role for message in conversation.messages] == ["user", "assistant"]


def test_a_role_with_another_name_is_renamed_by_prepare_and_refused_by_a_training(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for _ in range(4)), "utf-8")
    with pytest.raises(DataError, match=r"message 2 is from 'bot', .*lora-kit prepare makes it 'assistant'"):
        read_rows(file)
    (part,) = prepare(file, base=KIT_BASE, drop=["duplicates"]).parts
    assert part.examined.roles == {"bot": "assistant"}
    assert not part.examined.faults
