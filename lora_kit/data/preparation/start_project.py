"""The beginning of a project: a data folder with a recipe, from one's own rows or from an example."""

from __future__ import annotations

from pathlib import Path

from lora_kit.data.preparation.example_rows import GOALS, render_example
from lora_kit.data.preparation.prepare import prepare
from lora_kit.data.preparation.prepared_folder import Preparation
from lora_kit.errors import DataError, StorageError, format_list, suggest_nearest
from lora_kit.io.atomic_write import check_output, lock_output, write_file
from lora_kit.io.read import exists
from lora_kit.io.text import escape_text
from lora_kit.names import KIT_BASE


def start_project(
    goal: str | None, out: str | Path, *, base: str = KIT_BASE, data: str | Path | None = None
) -> Preparation:
    """Write a folder of data with a recipe that trains as it is; nothing that is there is replaced.

    Without data, an example is written beside the folder, as `<out>-example.jsonl`, and prepared.

    Args:
        goal: one of `GOALS`; None for whatever the data is for.
        out: the folder to write.
        base: the base that the recipe trains on.
        data: the file of rows, as `prepare` takes it; None for an example.

    Raises:
        DataError: the goal is unknown, or the rows are for another one; or as `prepare`.
        StorageError: something is there already, or cannot be written.
    """
    if goal is not None and goal not in GOALS:
        hint = suggest_nearest(goal, GOALS) or f"known: {format_list(list(GOALS))}"
        raise DataError(f"task {goal!r} is not known", hint=hint)
    folder = Path(out)
    check_output(folder)
    if data is None:
        if goal is None:
            raise DataError("an example is of a task", hint=f"one of {format_list(list(GOALS))}")
        return _prepare_example(folder.with_name(f"{folder.name}-example.jsonl"), goal, folder, base)
    _check_goal(goal, data, base)
    return prepare(data, folder, base=base)


def _prepare_example(file: Path, goal: str, out: Path, base: str) -> Preparation:
    """Write an example and prepare it; a file with the same rows may be there, which a stopped command has left."""
    rows = render_example(goal)
    if exists(file) and not _holds(file, rows):
        raise StorageError(f"{escape_text(file)} exists already", hint="choose another output")
    with lock_output(file):  # which creates the folders above, and removes them where the block fails
        write_file(file, rows)
        try:
            return prepare(file, out, base=base)
        except BaseException:
            file.unlink(missing_ok=True)
            raise


def _holds(file: Path, data: bytes) -> bool:
    return file.is_file() and file.stat().st_size == len(data) and file.read_bytes() == data


def _check_goal(goal: str | None, data: str | Path, base: str) -> None:
    """Raise DataError where rows are for another goal, before anything is written."""
    found = prepare(data, base=base).format
    if goal is not None and found not in GOALS[goal].formats:
        fitting = [name for name, each in GOALS.items() if found in each.formats]
        hint = f"--task {fitting[0]}" if fitting else "leave --task out"
        raise DataError(
            f"{escape_text(data)} has rows of the format {found}, which task {goal} is not learned from", hint=hint
        )
