"""Files with one message in a row become conversations, and roles as people write them get their names.

Only `prepare` does so: it says what it changed, and writes conversations as a training reads them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from lora_kit.data.records import Fault, Record, Row

ROLE_SYNONYMS: Final[Mapping[str, str]] = {
    "human": "user",
    "customer": "user",
    "client": "user",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
"""Names of roles that can mean only one, in lower case."""
_AGENT: Final = "agent"
"""Who answers customers; elsewhere it may be anybody."""
_CUSTOMERS: Final = frozenset({"customer", "client"})
_ROLES: Final = ("system", "developer", "user", "assistant", "tool")
_IN_TURN: Final = ("user", "assistant")
_SHAREGPT: Final = frozenset({"human", "gpt"})
_GROUP: Final = re.compile("(conversation|convo?|thread|chat|session|dialog|dialogue)(id)?")
_ROLE: Final = re.compile("role|from|speaker|sender|author")
_CONTENT: Final = re.compile("content|value|text|message|utterance|body")
_ORDER: Final = re.compile("(turn|message|msg)?(index|number|position|order)|turn(id)?|step")
_OTHER_LAYOUTS: Final = frozenset({"messages", "conversations", "prompt", "completion", "label", "labels"})
_MESSAGE_KEYS: Final = ("name", "tool_calls", "tool_call_id", "reasoning_content", "train", "weight")
"""Further keys of a message that a row may have."""
_LISTS: Final = ("messages", "conversations", "prompt", "completion")


@dataclass(frozen=True, kw_only=True)
class MessageRows:
    """The rows of a file as conversations.

    Attributes:
        records: a row for each conversation, with the line of its first message.
        faults: messages that stand in no order, or have no conversation or role.
        roles: names that roles had, and what they are called now.
        joined_by: the column that names the conversation; empty where a row was a conversation, or none, already.
        unused: columns that no message has.
    """

    records: Sequence[Record]
    faults: Sequence[Fault] = ()
    roles: Mapping[str, str] = field(default_factory=dict)
    joined_by: str = ""
    unused: Collection[str] = ()


@dataclass(frozen=True)
class _Columns:
    """The columns of a file of messages by what they hold; `order` is empty where there is none."""

    group: str
    role: str
    content: str
    order: str

    @classmethod
    def find(cls, row: Row) -> _Columns | None:
        """Return the columns of a row that is a message; None for other rows, or where several columns may be one."""
        plain = {name: re.sub(r"[\W_]", "", name.lower()) for name in row}
        found = [[name for name in row if known.fullmatch(plain[name])] for known in (_GROUP, _ROLE, _CONTENT)]
        if any(len(names) != 1 for names in found) or not _OTHER_LAYOUTS.isdisjoint(row):
            return None
        (group,), (role,), (content,) = found
        order = [name for name in row if _ORDER.fullmatch(plain[name])]
        return cls(group, role, content, order[0] if len(order) == 1 else "")


def join_message_rows(records: Sequence[Record]) -> MessageRows:
    """Return the rows of a file with one message in each as conversations, and roles under their own names.

    The messages of a conversation keep the order of the file; those of others may stand between them.
    """
    columns = _Columns.find(records[0][1])
    if columns is None:
        return _rename_roles(records)
    roles = _choose_roles({str(row.get(columns.role)) for _, row in records})
    groups: dict[str, list[Record]] = {}
    faults = []
    for line, row in records:
        group = row.get(columns.group)
        if group in (None, ""):
            faults.append(Fault(line, f"{columns.group} is empty"))
        else:
            groups.setdefault(str(group), []).append((line, row))
    joined: list[Record] = []
    for group in groups.values():
        fault = next(_find_faults(group, columns, roles), None)
        if fault is not None:
            faults.append(fault)
        else:
            joined.append((group[0][0], {"messages": [_make_message(row, columns, roles) for _, row in group]}))
    read = {columns.group, columns.role, columns.content, columns.order, *_MESSAGE_KEYS}
    return MessageRows(
        records=joined,
        faults=faults,
        roles={old: new for old, new in roles.items() if old != new},
        joined_by=columns.group,
        unused={name for _, row in records for name in row} - read,
    )


def _make_message(row: Row, columns: _Columns, roles: Mapping[str, str]) -> Row:
    further = {key: row[key] for key in _MESSAGE_KEYS if row.get(key) not in (None, "")}
    return {"role": roles[str(row[columns.role])], "content": row.get(columns.content), **further}


def _find_faults(group: Sequence[Record], columns: _Columns, roles: Mapping[str, str]) -> Iterator[Fault]:
    """Yield what is wrong with the messages of one conversation."""
    before: tuple[int, str, float | None] | None = None
    for line, row in group:
        role = roles.get(name := str(row.get(columns.role)))
        if role is None:
            yield Fault(line, f"{columns.role} is {name!r}: write user, assistant, system or tool there")
            return
        place = _parse_place(row.get(columns.order)) if columns.order else None
        if before is not None:
            earlier, last_role, last_place = before
            if place is not None and last_place is not None and place <= last_place:
                what = f"{columns.order} is {place:g}, and {last_place:g} in line {earlier} before it"
                yield Fault(line, f"{what}: put the messages of a conversation in their order")
            if role == last_role and role in _IN_TURN:
                yield Fault(line, f"the message is from the {role}, as that of line {earlier} before it is: join them")
        before = (line, role, place)


def _parse_place(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, (int, float, str)) else None
    except ValueError:
        return None


def _choose_roles(names: Collection[str]) -> dict[str, str]:
    """Return the roles that names mean, by name as it is written; names that may mean several are left out."""
    plain = {name: name.strip().lower() for name in names}
    known = {name: word if word in _ROLES else ROLE_SYNONYMS.get(word, "") for name, word in plain.items()}
    if not _CUSTOMERS.isdisjoint(plain.values()) and "assistant" not in known.values():
        known |= {name: "assistant" for name, word in plain.items() if word == _AGENT}
    return {name: role for name, role in known.items() if role}


def _rename_roles(records: Sequence[Record]) -> MessageRows:
    """Return rows with lists of messages, their roles under their own names; all others as they are."""
    names = {
        role
        for _, row in records
        for key in _LISTS
        for message in _list_messages(row.get(key))
        for role_key in ("role", "from")
        if isinstance(role := message.get(role_key), str) and not (role_key == "from" and role in _SHAREGPT)
    }
    roles = {old: new for old, new in _choose_roles(names).items() if old != new}
    if not roles:
        return MessageRows(records=records)
    return MessageRows(records=[(line, _rename_in_row(row, roles)) for line, row in records], roles=roles)


def _list_messages(value: object) -> list[Row]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _rename_in_row(row: Row, roles: Mapping[str, str]) -> Row:
    def rename(item: object) -> object:
        if not isinstance(item, dict):
            return item
        return {key: roles.get(value, value) if key in ("role", "from") and isinstance(value, str) else value
                for key, value in item.items()}  # fmt: skip

    lists = {key: value for key in _LISTS if isinstance(value := row.get(key), list)}
    return {**row, **{key: [rename(item) for item in value] for key, value in lists.items()}}
