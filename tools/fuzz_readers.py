"""What reads files of others, as functions from any bytes to a value or one of our errors.

`tools.fuzz` gives them bytes without end; `tests/faults/test_corpus.py` gives them the small cases that are kept.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import safetensors.torch
import torch

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_record import RECORD, find_changed_files
from lora_kit.adapter.folder import CONFIG, OLD_WEIGHTS, WEIGHTS
from lora_kit.adapter.model_card import render_adapter_card
from lora_kit.bank.attach import attach
from lora_kit.data.messages import Conversation, Message
from lora_kit.data.rows import scan_rows
from lora_kit.data.templates import chat_template
from lora_kit.errors import LoraKitError
from lora_kit.evaluation.adapter_format import find_adapter_labels, find_adapter_problem, find_thresholds
from lora_kit.generation.prompts import find_template, find_training_data
from lora_kit.io.sealed_json import NO_DIGEST, SELF_DIGEST, seal_json
from lora_kit.merging.checkpoint.shards import read_shards
from lora_kit.merging.writing.journal import FinishedFiles
from lora_kit.models.infer_base import infer_base
from lora_kit.models.silence import use_log_level
from lora_kit.training.loop.checkpoints import MARKER, RunFolder
from lora_kit.training.recipe.load import load_recipe

if TYPE_CHECKING:
    from lora_kit.models.protocols import Tokenizer

MAX_MESSAGE: Final = 500
"""Characters of an error about one file, at most; a list of mismatches has a line for each."""
MAX_LINES: Final = 12


@dataclass(frozen=True)
class FileReader:
    """One kind of file.

    Attributes:
        file: its path within a folder.
        read: is called with the folder and raises what the reader raises.
        make: writes what the reader needs beside the file.
    """

    file: str
    read: Callable[[Path], object]
    make: Callable[[Path], object] = lambda folder: None


def _make_adapter(folder: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    key = "base_model.model.q.lora_{}.weight"
    safetensors.torch.save_file(
        {key.format("A"): torch.ones(2, 3), key.format("B"): torch.ones(3, 2)}, folder / WEIGHTS
    )


def _make_old_adapter(folder: Path) -> None:
    _make_adapter(folder)
    (folder / WEIGHTS).unlink()


def _make_base(folder: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(2)}, folder / "model-00001-of-00001.safetensors")


def _read_record(folder: Path) -> object:
    """Read a record as it is, and again sealed with a digest that is right, and use everything that stands in it."""
    with contextlib.suppress(LoraKitError):
        Adapter.load(folder)
    path = folder / RECORD
    fields = _parse_or_none(path)
    if fields is not None:
        text = json.dumps({**fields, "format": 3, SELF_DIGEST: NO_DIGEST}, indent=2)
        path.write_text(seal_json(text), encoding="utf-8")
        with contextlib.suppress(LoraKitError):
            Adapter.load(folder)
    adapter = Adapter.load(folder, allow={"changed-files"})
    for use in _USES:
        with contextlib.suppress(LoraKitError):
            use(adapter)
    find_changed_files(folder, dict(adapter.record))
    attach(_Query(), slots=1).load("x", adapter, allow={"other-base"})
    return adapter


_USES: Final[tuple[Callable[[Adapter], object], ...]] = (
    find_adapter_labels,
    find_adapter_problem,
    lambda adapter: find_thresholds(adapter.record, find_adapter_labels(adapter)),
    find_template,
    find_training_data,
    lambda adapter: infer_base([str(adapter.folder)]),
    lambda adapter: render_adapter_card("x", adapter.config, adapter.record, parameters=1, digest="0" * 64),
    lambda adapter: attach(_Query(), slots=1).load("x", adapter),
)
"""What reads a record."""


class _Query(torch.nn.Module):
    """The least model that the adapter fits."""

    def __init__(self) -> None:
        super().__init__()
        self.q = torch.nn.Linear(3, 3)


def _parse_or_none(path: Path) -> dict[str, object] | None:
    """Return the JSON object in a file; None where there is none, or one that Python does not read."""
    with contextlib.suppress(ValueError, RecursionError):
        fields = json.loads(path.read_text(encoding="utf-8"))
        return fields if isinstance(fields, dict) else None
    return None


def _read_marker(folder: Path) -> object:
    """Read the marker of a checkpoint as it is, then sealed."""
    runs = RunFolder(folder / "out")
    path = runs.path(4) / MARKER
    runs.list_complete()
    fields = _parse_or_none(path)
    if fields is not None:
        path.write_text(seal_json(json.dumps({**fields, SELF_DIGEST: NO_DIGEST}, indent=2)), encoding="utf-8")
    return runs.read(4)


class _NoTokenizer:
    """What a template asks of a tokenizer."""

    special_tokens_map: Final = {"bos_token": "<s>", "eos_token": "</s>"}
    chat_template: Final = None


def _read_template(folder: Path) -> object:
    tokenizer = cast("Tokenizer", _NoTokenizer())
    template = chat_template(str(folder / "chat_template.jinja"), tokenizer, base="base")
    talk = Conversation((Message("user", "hi"), Message("assistant", "yo")))
    template.list_variables()
    if template.has_marks:
        template.find_marks(tokenizer, talk)
    return template.render(tokenizer, talk)


def _read_journal(folder: Path) -> object:
    finished = FinishedFiles(folder / ".out.kept", "key")
    return finished.find("model.safetensors")


def _rows_reader(suffix: str) -> FileReader:
    def read(folder: Path) -> object:
        return scan_rows(folder / f"rows.{suffix}", encoding="auto" if suffix == "csv" else "utf-8")

    return FileReader(f"rows.{suffix}", read)


READERS: Final[dict[str, FileReader]] = {
    "recipe": FileReader("recipe.yaml", lambda folder: load_recipe(folder / "recipe.yaml")),
    "recipe in TOML": FileReader("recipe.toml", lambda folder: load_recipe(folder / "recipe.toml")),
    "config": FileReader(CONFIG, lambda folder: Adapter.load(folder), _make_adapter),
    "record": FileReader(RECORD, _read_record, _make_adapter),
    "weights": FileReader(WEIGHTS, lambda folder: Adapter.load(folder), _make_adapter),
    "plain tensors": FileReader(OLD_WEIGHTS, lambda folder: Adapter.load(folder), _make_old_adapter),
    **{f"rows in {suffix}": _rows_reader(suffix) for suffix in ("jsonl", "json", "csv", "tsv", "txt", "parquet")},
    "index of shards": FileReader("model.safetensors.index.json", read_shards, _make_base),
    "marker of a checkpoint": FileReader(f"out.run/checkpoint-4/{MARKER}", _read_marker),
    "journal of a merge": FileReader(".out.kept/journal.json", _read_journal),
    "chat template": FileReader("chat_template.jinja", _read_template),
}


@contextlib.contextmanager
def open_reader(name: str, folder: Path) -> Iterator[Callable[[bytes], str]]:
    """Yield a function that reads bytes as one kind of file: `value`, or the name of the error, one of ours.

    It raises any other error, and AssertionError for a message of ours that is too long.
    """
    reader = READERS[name]
    place = folder / "made"
    place.mkdir(parents=True)
    reader.make(place)
    path = place / reader.file

    def read(data: bytes) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        try:
            reader.read(place)
        except LoraKitError as error:
            check_message(str(error))
            return type(error).__name__
        return "value"

    with use_log_level("lora_kit", logging.CRITICAL):
        yield read


def check_message(message: str) -> None:
    """Raise AssertionError for a message that no one would read: too long, too many lines, or not printable."""
    lines = message.splitlines()
    assert len(lines) <= MAX_LINES, f"a message of {len(lines)} lines"
    longest = max(map(len, lines), default=0)
    assert longest <= MAX_MESSAGE, f"a line of {longest} characters in a message"
