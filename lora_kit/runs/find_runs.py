"""The trainings and sweeps under a folder, and the one that a person names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeAlias

from lora_kit.errors import AdapterError, ConfigError, RecipeError, StorageError, UnknownAdapterError
from lora_kit.io.locks import FileLock
from lora_kit.io.output_lock import lock_path
from lora_kit.io.read import exists, folder_exists, read_text
from lora_kit.io.text import escape_text
from lora_kit.names import DEFAULT_STORE, METRICS_FILE, RECIPE_FILE, RUN_SUFFIX, SWEEP_SUFFIX
from lora_kit.runs.run_files import PROGRESS_FILE, find_run_folder
from lora_kit.runs.run_status import DamagedRun, RunStatus, read_status
from lora_kit.runs.sweep_status import SWEEP_PLAN, SweepStatus, read_sweep_status

MAX_LEVELS: Final = 6
"""Folders below the one that is searched."""
_RECIPE_SUFFIXES: Final = (".yaml", ".yml", ".toml")
_RECIPE_LIMIT: Final = 2**20
_SKIPPED: Final = ("node_modules", "site-packages", "__pycache__")
_LOCK_BEGIN, _LOCK_END = ".", f"{RUN_SUFFIX}.lock"


Status: TypeAlias = RunStatus | SweepStatus | DamagedRun


def find_runs(folder: Path) -> list[Status]:
    """Return the trainings and sweeps under a folder, the last one that wrote anything first; damaged ones too.

    Links and hidden folders are not followed. The trials of a sweep are part of it.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder_exists(folder):
        raise ConfigError(
            f"{escape_text(folder)} is no folder", hint="give one that trainings are in, or in its folders"
        )
    outs, sweeps = set[Path](), list[Path]()
    for path, names in _walk(folder):
        outs |= {path / name for name in _list_outs(path, names)}
        sweeps += [path / name for name in names if name.endswith(SWEEP_SUFFIX) and exists(path / name / SWEEP_PLAN)]
    found = [_read_or_describe(read_status, out) for out in outs]
    found += [_read_or_describe(read_sweep_status, sweep) for sweep in sweeps]
    begun = [status for status in found if status.state != "not started"]
    return sorted(begun, key=lambda status: (-(status.updated or float("inf")), str(status.out)))


def _read_or_describe(read: Callable[[Path], Status], path: Path) -> Status:
    """Return what a function reads; where that is damaged, what is wrong: one must not hide the others."""
    try:
        return read(path)
    except (AdapterError, StorageError) as error:
        return DamagedRun(out=path, problem=str(error))


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield every folder that may hold trainings, with the names in it."""
    for parent, folders, files in os.walk(folder):
        path = Path(parent)
        yield path, [*folders, *files]
        deep = len(path.relative_to(folder).parts) >= MAX_LEVELS
        folders[:] = [] if deep else [name for name in folders if _may_hold_runs(name)]


def _may_hold_runs(name: str) -> bool:
    return not name.startswith(".") and name not in _SKIPPED and not name.endswith((RUN_SUFFIX, SWEEP_SUFFIX))


def _list_outs(folder: Path, names: list[str]) -> Iterator[str]:
    """Yield the names of the outputs in a folder that a training is known of."""
    for name in names:
        path = folder / name
        if name.startswith(_LOCK_BEGIN) and name.endswith(_LOCK_END):
            yield name.removeprefix(_LOCK_BEGIN).removesuffix(_LOCK_END)
        elif name.endswith(RUN_SUFFIX) and folder_exists(path):
            yield name.removesuffix(RUN_SUFFIX)
        elif exists(path / METRICS_FILE) and exists(path / RECIPE_FILE) and not name.startswith("."):
            yield name


def find_run(name: str | Path) -> Path:
    """Return the output of the training that a person names.

    Args:
        name: a recipe, an output, the folder of its checkpoints, or an adapter's name in the store.

    Raises:
        RecipeError: the recipe names no output.
        UnknownAdapterError: there is no trace of a training.
    """
    path = Path(name)
    if path.suffix.lower() in _RECIPE_SUFFIXES:
        return _read_out(path)
    out = path.with_name(path.name.removesuffix(RUN_SUFFIX)) if path.name else path
    for candidate in (out, DEFAULT_STORE / out) if out.name else ():
        if _has_traces(candidate):
            return candidate
    known = [str(status.out) for status in find_runs(DEFAULT_STORE)] if folder_exists(DEFAULT_STORE) else []
    raise UnknownRunError(str(name), [found for found in known if found != str(out)])


def find_sweep(name: str | Path) -> Path | None:
    """Return the folder of the sweep that a person names; None where a training is meant.

    The output of a sweep that is not running, once it is there, is that of a training.

    Args:
        name: a recipe, an output or the folder of the sweep; also in the store.

    Raises:
        RecipeError: the recipe names no output.
        AdapterError, StorageError: a file of the sweep is damaged, or cannot be read.
    """
    path = Path(name)
    path = _read_out(path) if path.suffix.lower() in _RECIPE_SUFFIXES else path
    for candidate in (path, DEFAULT_STORE / path):
        if candidate.name.endswith(SWEEP_SUFFIX) and exists(candidate / SWEEP_PLAN):
            return candidate
        folder = candidate.with_name(f"{candidate.name}{SWEEP_SUFFIX}") if candidate.name else candidate
        if exists(folder / SWEEP_PLAN) and (not _has_traces(candidate) or read_sweep_status(folder).running):
            return folder
    return None


class UnknownRunError(UnknownAdapterError):
    """No training of that name."""

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(name, known)
        what = f"there is no training {name!r}: neither a recipe, nor an output, nor the folder of its checkpoints"
        self.args = (what,)
        self.message, self.hint = what, self.hint if known else "lora-kit runs lists what there is"


def _has_traces(out: Path) -> bool:
    folder = find_run_folder(out)
    return (
        exists(folder / PROGRESS_FILE)
        or exists(out / METRICS_FILE)
        or folder_exists(folder)
        or FileLock(lock_path(folder)).is_held
    )


def _read_out(recipe: Path) -> Path:
    import tomllib

    import yaml

    text = read_text(recipe, limit=_RECIPE_LIMIT)
    try:
        fields = tomllib.loads(text) if recipe.suffix.lower() == ".toml" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"{escape_text(recipe)}: cannot be parsed: {' '.join(str(error).split())}") from None
    out = fields.get("out") if isinstance(fields, dict) else None
    if not isinstance(out, str) or not out.strip():
        raise RecipeError(f"{escape_text(recipe)} names no out", hint="give the output of the training instead")
    return Path(out)
