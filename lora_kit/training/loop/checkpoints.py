"""Checkpoints of an unfinished training, in a folder beside its output: written whole, verified, rotated.

    adapters/sql.run/checkpoint-500/
        weights.safetensors     the trained tensors, never the base's
        optimizer.pt  scheduler.pt  scaler.pt  trainer_state.json      as transformers.Trainer writes them
        loop.pt                 random states, and what the training loop has counted
        checkpoint.json         whose run this is, and sha256 and size of the other files

A run is told by its recipe, its data, its base and its device. One that differs in any of them is another run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lora_kit.adapter.folder import RECORD
from lora_kit.errors import AdapterError, RecipeError, StorageError, format_list
from lora_kit.io.atomic_write import stage_folder
from lora_kit.io.read import exists, folder_exists, read_json
from lora_kit.io.text import escape_text

logger = logging.getLogger(__name__)

MARKER: Final = "checkpoint.json"
FORMAT: Final = 1
_NAME: Final = re.compile(r"checkpoint-(\d+)")
_MARKER_LIMIT: Final = 2**23

Identity = Mapping[str, Any]
"""What a run is of, as JSON values: nested mappings, compared leaf by leaf."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        folder: that holds it.
        step: optimiser steps done.
        best: step of the checkpoint that holds the best weights so far, where the run looks for them.
        finished: no step is left.
        identity: of the run. setting: versions and threads it was made with.
    """

    folder: Path
    step: int
    best: int | None
    finished: bool
    identity: Identity
    setting: Mapping[str, Any]


_FIELDS: Final = ("step", "best", "finished", "identity", "setting")


class RunFolder:
    """The checkpoints of one output.

    Args:
        out: the output of the training; its checkpoints are in a folder of the same name and `.run`.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self.folder = self.out.with_name(f"{self.out.name}.run")

    # Reading

    def find_newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; those after it, which are not, are taken away, and that is logged."""
        for step in sorted(self._list_steps(), reverse=True):
            try:
                found = self.at(step)
                if found.best is not None:
                    self.at(found.best)
                return found
            except AdapterError as error:
                logger.warning("%s is torn, and passed over: %s", escape_text(self.path(step)), error)
                shutil.rmtree(self.path(step))
        return None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step.

        Raises:
            AdapterError: it is not there, or not whole.
        """
        folder = self.path(step)
        record = read_json(folder / MARKER, limit=_MARKER_LIMIT)
        if record.get("format") != FORMAT:
            raise AdapterError(f"{MARKER} has format {record.get('format')!r}; format {FORMAT} is read")
        try:
            changed = [name for name, fact in record["files"].items() if _hash_file(folder / name) != fact]
            found = Checkpoint(folder=folder, **{key: record[key] for key in _FIELDS})
        except (KeyError, TypeError, AttributeError):
            raise AdapterError(f"{MARKER} is damaged") from None
        if changed:
            raise AdapterError(f"{format_list(changed)} not as written")
        return found

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def _list_steps(self) -> list[int]:
        if not folder_exists(self.folder):
            return []
        found = [_NAME.fullmatch(entry.name) for entry in self.folder.iterdir()]
        return [int(match[1]) for match in found if match]

    def log_resume_point(self) -> None:
        """Log from where a run that is stopped will go on."""
        steps = self._list_steps()
        if steps:
            where = escape_text(self.folder)
            logger.warning("stopped; the same command goes on from the checkpoint of step %d in %s", max(steps), where)

    # Writing

    def write(self, fill: Callable[[Path], None], *, keep: int | None, **fields: Any) -> None:
        """Write a checkpoint, all of it or nothing, and take old ones away.

        Args:
            fill: is given a folder to write files into.
            keep: checkpoints to keep at most, besides the best ones they name; None for all.
            fields: the other fields of a `Checkpoint`.

        Raises:
            StorageError: the disk refuses; earlier checkpoints are what they were.
        """
        with stage_folder(
            self.path(fields["step"]), replace=True, owned=lambda folder: exists(folder / MARKER)
        ) as folder:
            fill(folder)
            facts = {path.name: _hash_file(path) for path in sorted(folder.iterdir())}
            record = {"format": FORMAT, **fields, "files": facts}
            (folder / MARKER).write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")
        logger.debug("checkpoint of step %d in %s", fields["step"], escape_text(self.folder))
        if keep is not None:
            self._rotate(keep)

    def _rotate(self, keep: int) -> None:
        kept = sorted(self._list_steps(), reverse=True)[:keep]
        kept += [best for step in kept if (best := self._read_best_step(step)) is not None]
        for step in set(self._list_steps()) - set(kept):
            shutil.rmtree(self.path(step))

    def _read_best_step(self, step: int) -> int | None:
        try:
            return read_json(self.path(step) / MARKER, limit=_MARKER_LIMIT).get("best")
        except AdapterError:
            return None

    def remove(self) -> None:
        """Take every checkpoint away, and the folder where it holds nothing else; what cannot be is logged."""
        if not folder_exists(self.folder):
            return
        try:
            for entry in self.folder.iterdir():
                if _NAME.search(entry.name):  # also the locks and staging folders of those
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            if next(self.folder.iterdir(), None) is None:
                self.folder.rmdir()
        except OSError as error:
            logger.warning("%s cannot be removed: %s", escape_text(self.folder), error.strerror)

    def remove_if_done(self) -> None:
        """Take the checkpoints away where their adapter was saved, and the process died before it could do so."""
        newest = self.find_newest() if folder_exists(self.folder) and exists(self.out / RECORD) else None
        if newest is not None and _read_saved_run(self.out) == hash_json(newest.identity):
            self.remove()

    # One run and another

    def find_resumable(self, identity: Identity, setting: Mapping[str, Any], *, replace: bool) -> Checkpoint | None:
        """Where a run goes on; None where it begins.

        Args:
            identity: of the run. setting: versions and threads; where they differ, that is logged.
            replace: the checkpoints of another run are taken away, and that is logged.

        Raises:
            RecipeError: there are checkpoints of another run, and they are not to be replaced; names what differs.
        """
        newest = self.find_newest()
        found = self._match_run(newest, identity, replace=replace)
        if found is not None:
            for line in describe_differences(found.setting, setting):
                logger.warning("%s: the last bits of the result may be others", line)
        elif newest is not None:
            logger.warning("%s held a run of another recipe; it is replaced", escape_text(self.folder))
            self.remove()
        return found

    def preview_resumable(self, identity: Identity, *, replace: bool) -> Checkpoint | None:
        """Where a run would go on, as `resumable` says it; nothing is changed.

        Raises:
            RecipeError: as there.
        """
        whole = []
        for step in sorted(self._list_steps(), reverse=True):
            with contextlib.suppress(AdapterError):
                whole.append(self.at(step))
        return self._match_run(whole[0] if whole else None, identity, replace=replace)

    def _match_run(self, found: Checkpoint | None, identity: Identity, *, replace: bool) -> Checkpoint | None:
        """A checkpoint if it is of this run; None for none, or for one that is to be replaced."""
        told = list(describe_differences(found.identity, identity)) if found else []
        if told and found and not replace:
            raise RecipeError(
                f"{escape_text(self.folder)} holds a run at step {found.step} of another recipe:\n  "
                + "\n  ".join(told),
                hint="go back to that recipe to go on, or ask to replace (--replace) to start anew",
            )
        return None if told else found


def hash_json(identity: Identity) -> str:
    """sha256 of what a run is of."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def describe_differences(was: Mapping[str, Any], now: Mapping[str, Any], *, within: str = "") -> Iterator[str]:
    """What differs between two nested mappings, leaf by leaf, in words."""
    for key in sorted({*was, *now}):
        name, old, new = f"{within}{key}", was.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from describe_differences(old, new, within=f"{name}.")
        elif old != new:
            yield f"{name} was {_format_value(old)}, is {_format_value(new)}"


def _format_value(value: Any) -> str:
    return "not set" if value is None else escape_text(json.dumps(value, default=str))


def _read_saved_run(out: Path) -> Any:
    """The run that an adapter folder was saved by."""
    try:
        return read_json(out / RECORD, limit=_MARKER_LIMIT).get("run")
    except (AdapterError, StorageError):
        return None


def _hash_file(path: Path) -> dict[str, Any]:
    """sha256 and size of a file.

    Raises:
        AdapterError: it is not there.
    """
    try:
        with open(path, "rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": os.fstat(file.fileno()).st_size}
    except FileNotFoundError:
        raise AdapterError(f"{path.name} is missing") from None
