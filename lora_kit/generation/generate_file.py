"""`generate_file`: the prompts of a file answered in batches and written; a run that was killed goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Literal

from lora_kit.adapter.adapter_like import AdapterLike
from lora_kit.config.validation import is_whole_number, require
from lora_kit.data.records import Fault
from lora_kit.data.rows import build_fault_error
from lora_kit.errors import ConfigError, DataError, StorageError
from lora_kit.generation.adapter_args import list_input_folders
from lora_kit.generation.batch_generator import AskedRow, BatchGenerator, open_batch_generator
from lora_kit.generation.decoding import Sampling
from lora_kit.generation.generate import Generation
from lora_kit.generation.prompt_file import PromptFile, PromptRow, read_prompt_file
from lora_kit.io.atomic_write import lock_output, write_file
from lora_kit.io.output_file import check_output_file
from lora_kit.io.output_overlap import refuse_overlap
from lora_kit.io.read import exists
from lora_kit.io.text import escape_text
from lora_kit.io.write_errors import translate_os_errors
from lora_kit.models.loading import Base
from lora_kit.names import DEFAULT_STORE
from lora_kit.targets.fingerprint import fingerprint

logger = logging.getLogger(__name__)

_SUFFIX: Final = ".jsonl"
PARTIAL_SUFFIX: Final = ".partial"
"""After the name of the output: the file of the answers so far."""
_BEGINNING: Final = b'{"lora_kit answers": 2, "of": '

Progress = Callable[[int, int], None]
"""Called with how many answers are there, and how many there will be."""


@dataclass(frozen=True)
class FileAnswer:
    """The answer of one adapter to one row of a file.

    Attributes:
        row: the row.
        generation: the answer.
    """

    row: PromptRow
    generation: Generation

    def to_json(self) -> dict[str, object]:
        """Return the answer as JSON values: the row as it stands in the file, the adapter, and what it wrote."""
        answer = self.generation
        written = {"adapter": answer.name, "text": answer.text, "tokens": answer.tokens, "ended": answer.ended}
        return {**self.row.to_json(), **written}


def generate_file(
    base: str | Base,
    adapters: Sequence[AdapterLike | None],
    data: str | Path,
    *,
    out: str | Path | None = None,
    sampling: Sampling | None = None,
    template: Literal["adapter", "raw"] = "adapter",
    batch_size: int = 16,
    replace: bool = False,
    store: str | Path = DEFAULT_STORE,
    quantize: str | None = None,
    allow: Collection[str] = (),
    on_progress: Progress | None = None,
) -> list[FileAnswer]:
    """Answer the prompts of a file, each with every adapter, or with the one that its row names.

    Prompts of similar lengths are answered together; greedy answers are those of one prompt alone. With `out`, answers
    are kept as they come in a file beside it: the same call after a kill answers only what is missing.

    Args:
        base, adapters, sampling, template, store, quantize, allow: as in `generate`; no adapters where rows name them.
        data: the file, see `lora_kit.generation.prompt_file`.
        out: a JSONL file for the answers, in the order of the rows; written all or nothing.
        batch_size: prompts in one batch.
        replace: whether `out` may be replaced, and answers so far of other prompts or settings.
        on_progress: called after each batch.

    Raises:
        ConfigError: adapters were given and the rows name their own, `out` is not JSONL, or a value is out of range.
        UnknownAdapterError, AdapterError: an adapter does not exist, cannot be read, or writes no text.
        DataError: the file cannot be read, a row names an unknown adapter, or a prompt cannot be answered; the message
            lists the lines.
        StorageError: `out` exists or is `data`, or the answers so far are of other prompts or settings.
    """
    require(is_whole_number(batch_size) and batch_size >= 1, "batch_size", batch_size, "a whole number from 1")
    if out is not None:
        _check_out(Path(out), Path(data), replace=replace)
    file = read_prompt_file(data)
    named = _list_adapters(file, adapters, store)
    if out is not None:
        refuse_overlap(Path(out), list_input_folders(base, named, store=store))
    options = {"sampling": sampling, "template": template, "store": store, "quantize": quantize, "allow": allow}
    with open_batch_generator(base, named, **options) as generator:  # type: ignore[arg-type]
        asked = _encode_rows(generator, file, named, Path(data))
        identity = _identify(generator, asked, batch_size)
        with _open_answers(out, identity, replace=replace) as answers:
            _answer_missing(generator, [each for _, each in asked], answers, batch_size, on_progress)
            found = [FileAnswer(row, answers.found[index]) for index, (row, _) in enumerate(asked)]
            if out is not None:
                lines = (json.dumps(each.to_json(), ensure_ascii=False) + "\n" for each in found)
                write_file(Path(out), "".join(lines).encode())
            answers.remove()
    return found


def _check_out(out: Path, data: Path, *, replace: bool) -> None:
    """Check that answers can be written, and that neither they nor those so far replace the prompts."""
    if out.suffix.lower() != _SUFFIX:
        raise ConfigError(f"{escape_text(out)}: answers are written as JSONL", hint=f"name it {_SUFFIX}")
    check_output_file(out, replace=replace, inputs=[data])
    partial = Path(f"{out}{PARTIAL_SUFFIX}")
    if exists(partial):
        check_output_file(partial, replace=True, inputs=[data])
        _check_own(partial)


def _check_own(partial: Path) -> None:
    """Raise StorageError for a file that does not begin as one of answers so far does, or as far as it got."""
    with translate_os_errors(partial), partial.open("rb") as file:
        beginning = file.read(len(_BEGINNING))
    if not _BEGINNING.startswith(beginning):
        what = f"{escape_text(partial)} is in the way, and is not of lora_kit"
        raise StorageError(what, hint="move it, or choose another output")


def _list_adapters(
    file: PromptFile, adapters: Sequence[AdapterLike | None], store: str | Path
) -> list[AdapterLike | None]:
    """Return the adapters that answer: those that were given, or those that the rows name, each once."""
    if not file.names_adapters:
        return list(adapters) or [None]
    if adapters:
        if all(each is None for each in adapters):
            hint = "leave --compare out; a row with an empty adapter is answered by the base"
            raise ConfigError("the rows name their adapters, and the base was given too", hint=hint)
        flags = "--adapter and --compare" if None in adapters else "--adapter"
        raise ConfigError("the rows name their adapters, and others were given", hint=f"leave {flags} out")
    return [*file.list_named_adapters(store)]


def _encode_rows(
    generator: BatchGenerator, file: PromptFile, adapters: Sequence[AdapterLike | None], path: Path
) -> list[tuple[PromptRow, AskedRow]]:
    """Return every row with each adapter that answers it.

    Raises:
        DataError: prompts cannot be answered.
    """
    labels = dict(zip(adapters, generator.labels, strict=True)) if file.names_adapters else {}
    asked: list[tuple[PromptRow, AskedRow]] = []
    faults: list[Fault] = []
    for row in file.rows:
        for label in [labels[row.adapter]] if file.names_adapters else dict.fromkeys(generator.labels):
            try:
                asked.append((row, generator.encode(row.prompt, label)))
            except DataError as error:
                faults.append(Fault(row.line, str(error)))
                break
    if faults:
        raise build_fault_error(path, faults)
    return asked


def _identify(generator: BatchGenerator, asked: Sequence[tuple[PromptRow, AskedRow]], batch_size: int) -> str:
    """Return the sha256 of everything that decides the answers: then those that are there can be kept."""
    facts = fingerprint(generator.base.model)
    sampling = generator.sampling
    parts = {
        "base": {key: facts[key] for key in ("structure", "weights")},
        "adapters": {label: each.digest if each else None for label, each in generator.adapters.items()},
        "rows": [(each.label, each.encoded.ids) for _, each in asked],
        "sampling": dataclasses.asdict(sampling),
        "batch_size": batch_size if sampling.temperature > 0 else None,  # drawn tokens depend on the neighbors
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _answer_missing(
    generator: BatchGenerator,
    rows: Sequence[AskedRow],
    answers: _Answers,
    batch_size: int,
    on_progress: Progress | None,
) -> None:
    """Answer the rows that have no answer yet, batch by batch."""
    if answers.found:
        logger.info("%d of %d answers are there already", len(answers.found), len(rows))
    for number, batch in enumerate(generator.plan_batches(rows, batch_size)):
        missing = [index for index in batch if index not in answers.found]
        if missing:
            generated = generator.answer([rows[index] for index in missing], number=number)
            answers.add(dict(zip(missing, generated, strict=True)))
        if on_progress is not None:
            on_progress(len(answers.found), len(rows))


class _Answers:
    """The answers so far, in memory and in the file beside the output: a line for each batch, after one that says of
    what they are.

    Attributes:
        found: by the index of the row.
    """

    def __init__(self, path: Path | None, found: Mapping[int, Generation], stream: IO[bytes] | None) -> None:
        self.found, self._path, self._stream = dict(found), path, stream

    def add(self, answers: Mapping[int, Generation]) -> None:
        """Keep the answers of a batch: in one line, so that a kill leaves all of them or none."""
        self.found |= answers
        if self._stream is None:
            return
        values = json.dumps({str(index): dataclasses.asdict(each) for index, each in answers.items()}).encode()
        self._stream.write(_digest(values) + b" " + values + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def remove(self) -> None:
        """Remove the file: the output is written."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def _open_answers(out: str | Path | None, identity: str, *, replace: bool) -> Iterator[_Answers]:
    """Open the answers so far of an output, locked against other processes; without an output they are in memory."""
    if out is None:
        yield _Answers(None, {}, None)
        return
    path = Path(f"{out}{PARTIAL_SUFFIX}")
    with lock_output(Path(out)), translate_os_errors(path):
        lines = _read_whole_lines(path)
        if lines and lines[0] != _write_header(identity):
            if not replace:
                what = f"{escape_text(path)} holds answers to other prompts, or of other adapters or settings"
                raise StorageError(what, hint="--replace starts anew; or remove it")
            lines = []
        lines = lines[:1] + _take_undamaged(lines[1:], path)
        with path.open("r+b" if lines else "wb") as stream:
            stream.truncate(sum(map(len, lines)))  # without what a kill has cut off
            stream.seek(0, os.SEEK_END)
            if not lines:
                stream.write(_write_header(identity))
            found = {
                int(index): Generation(**fields)
                for line in lines[1:]
                for index, fields in json.loads(line.partition(b" ")[2]).items()
            }
            yield _Answers(path, found, stream)


def _take_undamaged(lines: list[bytes], path: Path) -> list[bytes]:
    """Return the lines of answers before the first that is not as it was written; warn of that one."""
    for index, line in enumerate(lines):
        digest, _, values = line.rstrip(b"\n").partition(b" ")
        if digest != _digest(values):
            what = "%s: line %d is damaged; its answers and those after it are given anew"
            logger.warning(what, escape_text(path), index + 2)
            return lines[:index]
    return lines


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


def _write_header(identity: str) -> bytes:
    return _BEGINNING + json.dumps(identity).encode() + b"}\n"


def _read_whole_lines(path: Path) -> list[bytes]:
    """Return the lines of a file; one that a kill has cut off does not count."""
    if not path.exists():
        return []
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
