"""Checkpoints of an unfinished training, in a folder beside its output: written whole, verified, rotated.

    adapters/sql.run/               the log, and where the training stands; see `lora_kit.runs.run_files`
    adapters/sql.run/samples/       the samples, where the recipe streams its rows; see `lora_kit.data.sample_store`
    adapters/sql.run/checkpoint-500/
        adapter_config.json  adapter_model.safetensors  lora_kit.json  README.md       the adapter at that step
        weights.safetensors     the trained tensors that the adapter's file does not hold, never the base's
        average.safetensors     their moving average, where the recipe asks for one; the adapter is that average
        optimizer.pt  scheduler.pt  scaler.pt  trainer_state.json      as transformers.Trainer writes them
        loop.pt                 random states, and what the training loop has counted
        checkpoint.json         the run it belongs to, and sha256 and size of the other files

A run is identified by its recipe, its data, its base and its device. If any of them differs, it is another run, but
for the number of processes where a step has as many rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from lora_kit.adapter.adapter_record import RECORD
from lora_kit.adapter.folder import CONFIG
from lora_kit.data.sample_store import remove_samples
from lora_kit.errors import AdapterError, RecipeError, StorageError, format_list
from lora_kit.io.atomic_write import remove_leftovers, stage_folder
from lora_kit.io.output_lock import is_empty_folder, remove_folder
from lora_kit.io.read import exists, folder_exists, has_recorded_hash, hash_file, read_json, read_text
from lora_kit.io.sealed_json import NO_DIGEST, SELF_DIGEST, is_intact, seal_json
from lora_kit.io.strict_json import JsonObject, parse_object
from lora_kit.io.text import escape_text, format_value
from lora_kit.names import CHECKPOINT_FILE
from lora_kit.runs.run_files import find_run_folder, read_saved_run, remove_run_files
from lora_kit.training.loop.run_differences import describe_differences, describe_run_differences
from lora_kit.training.prefix.prefix_cache import FOLDER as PREFIX_FOLDER
from lora_kit.training.prefix.prefix_cache import remove_prefix_states

logger = logging.getLogger(__name__)

MARKER: Final = CHECKPOINT_FILE
LOOP: Final = "loop.pt"
_OWN_FILES: Final = (MARKER, LOOP)
FORMAT: Final = 3
_READ_FORMATS: Final = (2, FORMAT)
"""A checkpoint of format 2 holds no adapter; its `weights.safetensors` has every trained tensor."""
_NAME: Final = re.compile(r"checkpoint-(0|[1-9]\d{0,17})")
_LOCK_NAME: Final = re.compile(r"\.checkpoint-(0|[1-9]\d{0,17})\.lock")
_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "files": (dict,),
    "step": (int,),
    "best": (int, type(None)),
    "finished": (bool,),
    "identity": (dict,),
    "setting": (dict,),
}
_MARKER_LIMIT: Final = 2**23

Identity: TypeAlias = Mapping[str, object]
"""What decides the result of a run, as JSON values: nested mappings, compared leaf by leaf."""
Environment: TypeAlias = Mapping[str, object]
"""What may change the last bits of the result: versions of packages and the number of threads."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete, verified checkpoint.

    Attributes:
        folder: where it is.
        step: optimizer steps done.
        best: step of the checkpoint with the best weights so far; None where the run does not keep the best.
        finished: whether no step is left.
        identity: of the run.
        setting: the environment it was written in.
    """

    folder: Path
    step: int
    best: int | None
    finished: bool
    identity: Identity
    setting: Environment


_FIELDS: Final = ("step", "best", "finished", "identity", "setting")


class RunFolder:
    """The checkpoints of one output.

    Args:
        out: the output of the training; the checkpoints are in the folder `<out>.run` beside it.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self.folder = find_run_folder(self.out)
        self.samples = self.folder / "samples"
        self.prefix = self.folder / PREFIX_FOLDER

    # Reading

    def find_newest(self) -> Checkpoint | None:
        """Return the newest complete checkpoint; incomplete ones after it are removed, with a warning."""
        for step in sorted(self._list_steps(), reverse=True):
            try:
                checkpoint = self.read(step)
                if checkpoint.best is not None:
                    self.read(checkpoint.best)
                return checkpoint
            except AdapterError as error:
                logger.warning("%s is incomplete and is removed: %s", escape_text(self.path(step)), error)
                self._remove_step(step)
        return None

    def list_complete(self) -> list[Checkpoint]:
        """Return the complete checkpoints, newest first; nothing is changed or logged."""
        complete: list[Checkpoint] = []
        for step in sorted(self._list_steps(), reverse=True):
            with contextlib.suppress(AdapterError):
                complete.append(self.read(step))
        return complete

    def read(self, step: int) -> Checkpoint:
        """Return the checkpoint of a step, verified by its checksums.

        Raises:
            AdapterError: it is missing or incomplete.
        """
        folder = self.path(step)
        record = _read_marker(folder)
        is_whole = all(name in record and isinstance(record[name], kinds) for name, kinds in _TYPES.items())
        if not is_whole or record["step"] != step:
            raise AdapterError(f"{MARKER} is damaged")
        changed = [name for name, facts in record["files"].items() if not has_recorded_hash(folder / name, facts)]
        checkpoint = Checkpoint(folder=folder, **{key: record[key] for key in _FIELDS})
        if changed:
            raise AdapterError(f"{format_list(changed)} changed since the checkpoint was written")
        return checkpoint

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint of a step."""
        return self.folder / f"checkpoint-{step}"

    def _list_steps(self) -> list[int]:
        """Return the steps of the checkpoints that were written here, complete or not; what else is there is not."""
        return [step for step, path in self._list_named() if _is_own(path)]

    def _list_named(self) -> list[tuple[int, Path]]:
        """Return what has the name of a checkpoint, with its step."""
        if not folder_exists(self.folder):
            return []
        matches = [(_NAME.fullmatch(entry.name), entry) for entry in self.folder.iterdir()]
        return [(int(match[1]), entry) for match, entry in matches if match]

    def _check_foreign(self) -> None:
        """Log what has the name of a checkpoint and was not written as one.

        Raises:
            StorageError: a folder, whose files nobody may replace.
        """
        for _, path in self._list_named():
            if not _is_own(path):
                if path.is_dir() and not path.is_symlink():
                    what = f"{escape_text(path)} is not a checkpoint of lora_kit"
                    raise StorageError(f"{what}, and has the name of one", hint="move it, or choose another output")
                logger.warning("%s is passed over: it is not a folder", escape_text(path))

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is one, complete or not."""
        return bool(self._list_steps())

    def log_resume_point(self) -> None:
        """Log the step from which a stopped run will resume."""
        if self.has_checkpoint:
            logger.warning("stopped; %s", self.describe_resume())

    def describe_resume(self) -> str:
        """Return from where a stopped run will resume, in words."""
        steps = self._list_steps()
        if not steps:
            return "the same command starts it again: there is no checkpoint yet"
        return f"the same command resumes from the checkpoint of step {max(steps)} in {escape_text(self.folder)}"

    # Writing

    def write(self, fill: Callable[[Path], None], *, keep: int | None, needed: int = 0, **fields: Any) -> None:
        """Write a checkpoint, all or nothing, and remove old ones.

        Args:
            fill: writes the files into the folder it is called with.
            keep: number of checkpoints to keep, at most, besides the best ones they name; None for all.
            needed: bytes of the files, about, for the check of free space.
            fields: the fields of a `Checkpoint`, without `folder`.

        Raises:
            StorageError: the checkpoint cannot be written; earlier ones are unchanged.
        """
        target = self.path(fields["step"])
        _set_aside(target)
        with stage_folder(target, replace=True, owned=_is_own, needed=needed) as folder:
            fill(folder)
            files = {path.name: hash_file(path) for path in sorted(folder.iterdir())}
            record = {"format": FORMAT, **fields, "files": files, SELF_DIGEST: NO_DIGEST}
            text = json.dumps(record, indent=2, sort_keys=True, default=str)
            (folder / MARKER).write_text(seal_json(text), encoding="utf-8")
        logger.debug("checkpoint of step %d in %s", fields["step"], escape_text(self.folder))
        if keep is not None:
            self._rotate(keep)

    def _rotate(self, keep: int) -> None:
        """Remove all checkpoints but the newest and the best ones that these name."""
        steps = self._list_steps()
        newest = sorted(steps, reverse=True)[:keep]
        best = {self._read_best_step(step) for step in newest}
        for step in set(steps) - set(newest) - best:
            self._remove_step(step)

    def _remove_step(self, step: int) -> None:
        """Remove the checkpoint of a step; a process that dies meanwhile leaves nothing that looks like an adapter."""
        (self.path(step) / CONFIG).unlink(missing_ok=True)
        remove_folder(self.path(step), last=_OWN_FILES)

    def _read_best_step(self, step: int) -> int | None:
        try:
            return read_json(self.path(step) / MARKER, limit=_MARKER_LIMIT).get("best")
        except AdapterError:
            return None

    def remove(self) -> None:
        """Remove every checkpoint, and the folder where it is then empty; a failure is logged.

        What has no marker of a checkpoint stays.
        """
        if not folder_exists(self.folder):
            return
        try:
            for match in [_LOCK_NAME.fullmatch(entry.name) for entry in self.folder.iterdir()]:
                if match:  # a process died while it wrote
                    remove_leftovers(self.path(int(match[1])))
            for step in self._list_steps():
                self._remove_step(step)
            remove_prefix_states(self.prefix)
            remove_samples(self.samples)
            remove_run_files(self.folder)
        except OSError as error:
            logger.warning("%s cannot be removed: %s", escape_text(self.folder), error.strerror or error)

    def remove_if_done(self) -> None:
        """Remove the checkpoints of an adapter that was saved by a process that died before it removed them."""
        newest = self.find_newest() if folder_exists(self.folder) and exists(self.out / RECORD) else None
        if newest is not None and read_saved_run(self.out) == hash_json(newest.identity):
            self.remove()

    # One run and another

    def find_resumable(self, identity: Identity, setting: Environment, *, replace: bool) -> Checkpoint | None:
        """Return the checkpoint that a run resumes from; None where it starts at step 0.

        Args:
            identity: of the run.
            setting: the environment; differences from the checkpoint's are logged.
            replace: whether checkpoints of another run are removed, with a warning.

        Raises:
            RecipeError: there are checkpoints of another run and `replace` is false; lists what differs.
            StorageError: a folder that is no checkpoint has the name of one.
        """
        self._check_foreign()
        newest = self.find_newest()
        checkpoint = self._match_run(newest, identity, setting, replace=replace)
        if checkpoint is not None:
            for line in describe_differences(checkpoint.setting, setting):
                logger.warning("%s: the last bits of the result may differ", line)
        elif newest is not None:
            logger.warning("%s had checkpoints of another recipe; they are removed", escape_text(self.folder))
            self.remove()
        return checkpoint

    def preview_resumable(self, identity: Identity, setting: Environment, *, replace: bool) -> Checkpoint | None:
        """Return what `find_resumable` would return or raise, without changing or logging anything."""
        self._check_foreign()
        return self._match_run(next(iter(self.list_complete()), None), identity, setting, replace=replace)

    def _match_run(
        self, checkpoint: Checkpoint | None, identity: Identity, setting: Environment, *, replace: bool
    ) -> Checkpoint | None:
        """Return the checkpoint if it is of this run; None without one, or where it is to be replaced."""
        if checkpoint is None:
            return None
        differences = list(describe_run_differences(checkpoint, identity, setting))
        if not differences or replace:
            return None if differences else checkpoint
        where = f"{escape_text(self.folder)} holds a run at step {checkpoint.step} of another recipe"
        raise RecipeError(
            "\n  ".join([f"{where}:", *differences]),
            hint="use that recipe again to resume, or --replace to start from step 0",
        )


def hash_json(identity: Identity) -> str:
    """Return the sha256 of a run's identity, in hex."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def _read_marker(folder: Path) -> JsonObject:
    text = read_text(folder / MARKER, limit=_MARKER_LIMIT)
    try:
        record = parse_object(text)
    except ValueError as error:
        raise AdapterError(f"{MARKER}: {error}") from None
    if record.get("format") not in _READ_FORMATS:
        given = format_value(record.get("format"))
        raise AdapterError(
            f"{MARKER} has format {given}; formats {format_list([str(known) for known in _READ_FORMATS])} are read"
        )
    if not is_intact(record, text):
        raise AdapterError(f"{MARKER} changed since the checkpoint was written")
    return record


def _is_own(path: Path) -> bool:
    """Return whether a folder was written here, whole or not: it has a file that no other program writes, or none."""
    if not path.is_dir() or path.is_symlink():
        return False
    return any(exists(path / name) for name in _OWN_FILES) or is_empty_folder(path)


def _set_aside(path: Path) -> None:
    """Rename a file, FIFO or link that has the name of a checkpoint to be written."""
    if not os.path.lexists(path) or (path.is_dir() and not path.is_symlink()):
        return
    names = (path.with_name(f"{path.name}.set-aside-{number}") for number in itertools.count(1))
    free = next(name for name in names if not os.path.lexists(name))
    logger.warning("%s is in the place of a checkpoint, and is %s now", escape_text(path), escape_text(free.name))
    os.rename(path, free)
