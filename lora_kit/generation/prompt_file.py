"""A file of prompts: texts or conversations to be answered, and perhaps by which adapter.

file     a row                                            column `adapter`
.txt     each line a prompt                               –
others   `prompt`, or `messages` and their answers        the adapter that answers the row; empty for the base
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_kit.adapter.adapter_files import list_adapter_subfolders
from lora_kit.adapter.adapter_location import resolve_adapter
from lora_kit.data.cells import RowError, read_optional_string, read_string
from lora_kit.data.messages import INSTRUCTIONS, Conversation
from lora_kit.data.read_messages import read_open_conversation
from lora_kit.data.readers import check_is_file, read_file
from lora_kit.data.records import Fault, Row
from lora_kit.data.rows import build_fault_error, warn_of_unused
from lora_kit.errors import AdapterError, DataError, UnknownAdapterError, format_list
from lora_kit.io.given_values import parse_path
from lora_kit.io.read import read_text
from lora_kit.io.text import escape_text

ADAPTER_COLUMN: Final = "adapter"
_LINES: Final = ".txt"
_READ_COLUMNS: Final = ("prompt", "messages", "tools", "chat_template_kwargs", "id", ADAPTER_COLUMN)
_LIMIT: Final = 2**30
"""Bytes of a file of lines."""


@dataclass(frozen=True)
class PromptRow:
    """A prompt of a file.

    Attributes:
        line: the line it begins on, from 1; in a JSON array and in a Parquet file the number of the row.
        prompt: the text, or the conversation so far.
        adapter: the adapter that its row names; None for the base, and where rows name none.
        id: what its row is called there; None where it has no name.
    """

    line: int
    prompt: str | Conversation
    adapter: str | None = None
    id: object = None

    def to_json(self) -> dict[str, object]:
        """Return the row as JSON values, without its adapter."""
        own = {} if self.id is None else {"id": self.id}
        if isinstance(self.prompt, str):
            return {"line": self.line, **own, "prompt": self.prompt}
        return {"line": self.line, **own, **self.prompt.to_json()}


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file.

    Attributes:
        path: of the file.
        rows: in the order of the file.
        names_adapters: whether the rows say which adapter answers them.
    """

    path: Path
    rows: tuple[PromptRow, ...]
    names_adapters: bool

    def list_named_adapters(self, store: str | Path) -> list[str | None]:
        """Return the adapters that the rows name, each once, in their order; None for the base.

        Raises:
            DataError: some do not exist; the message has each with the first line that names it.
            AdapterError: one cannot be fetched.
        """
        first_lines: dict[str | None, int] = {}
        for row in self.rows:
            first_lines.setdefault(row.adapter, row.line)
        faults: list[Fault] = []
        for name, line in first_lines.items():
            try:
                if name is not None:
                    resolve_adapter(name, store=store)
            except UnknownAdapterError as error:
                faults.append(Fault(line, error.message))
        if faults:
            known = [folder.name for folder in list_adapter_subfolders(Path(store))]
            raise build_fault_error(self.path, faults, hint=f"{escape_text(store)} holds {format_list(known)}")
        return list(first_lines)


def read_prompt_file(path: str | Path) -> PromptFile:
    """Read the prompts of a file.

    Raises:
        DataError: the file cannot be read, has no prompt, or rows without one; the message lists their lines.
    """
    path = parse_path(path, name="the file of prompts")
    if path.suffix.lower() == _LINES:
        return _read_lines(path)
    contents = read_file(path)
    faults, rows = list(contents.faults), []
    for line, row in contents.records:
        try:
            rows.append(_read_row(line, row))
        except RowError as error:
            faults.append(Fault(line, str(error)))
    if faults:
        raise build_fault_error(path, sorted(faults))
    if not rows:
        raise DataError(f"{path} has no rows", hint="the ending of its name decides how a file is read")
    named = [line for line, row in contents.records if ADAPTER_COLUMN in row]
    unnamed = [Fault(line, "adapter is missing; other rows name one") for line, row in contents.records
               if ADAPTER_COLUMN not in row]  # fmt: skip
    if named and unnamed:
        raise build_fault_error(path, unnamed)
    warn_of_unused(path, {key for _, row in contents.records for key in row} - {*_READ_COLUMNS})
    return PromptFile(path, tuple(rows), bool(named))


def _read_lines(path: Path) -> PromptFile:
    check_is_file(path)
    try:
        lines = read_text(path, limit=_LIMIT).removeprefix("\ufeff").split("\n")
    except AdapterError as error:  # of any small file
        raise DataError(str(error)) from None
    rows = [PromptRow(number, line.removesuffix("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise DataError(f"{path} has no prompts", hint="each line is one")
    return PromptFile(path, tuple(rows), names_adapters=False)


def _read_row(line: int, row: Row) -> PromptRow:
    adapter = read_optional_string(ADAPTER_COLUMN, row.get(ADAPTER_COLUMN)) or None
    if row.get("messages") is not None:
        if row.get("prompt") not in (None, ""):
            raise RowError("prompt and messages are both given; give one of them")
        conversation = read_open_conversation(row)
        if all(message.role in INSTRUCTIONS for message in conversation.messages):
            raise RowError("the conversation has instructions only; a message of the user is expected")
        return PromptRow(line, conversation, adapter, row.get("id"))
    if "prompt" not in row:
        raise RowError(f"prompt or messages is expected; the row has {format_list(sorted(map(str, row)))}")
    return PromptRow(line, read_string("prompt", row["prompt"]), adapter, row.get("id"))
