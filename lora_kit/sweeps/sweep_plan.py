"""What a sweep is to do, and the folder it does it in.

adapters/sql.sweep/
    plan.json       what is swept, how, and sums of what it is swept on
    journal.log     every trial: its values, its evaluations, its result (optuna's journal)
    trials/3/sql    a trial's adapter, while it may still be the best one
    locks/          who works on what
    results.json    the trials once all are done, and results.png, the same as a picture
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from lora_kit.errors import AdapterError, RecipeError, StorageError
from lora_kit.evaluation.metrics import METRICS
from lora_kit.io.atomic_write import write_file
from lora_kit.io.locks import FileLock
from lora_kit.io.read import exists, read_json
from lora_kit.io.text import escape_text
from lora_kit.sweeps.space import Choices, Params, Space, space_of
from lora_kit.training.loop.checkpoints import describe_differences, hash_json
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.recipe.recipe import METHODS_CHANGING_BASE, Recipe

PLAN: Final = "plan.json"
LOCKS: Final = "locks"
_LIMIT: Final = 2**23


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A sweep, checked.

    Attributes:
        out: folder of the best trial's result.
        fields: the recipe as it was given, without defaults.
        space: what is swept.
        method: `grid`, `random` or `tpe`.
        metric: of the validation rows, by which trials are compared.
        trials: how many.
        seed: decides the values of every trial.
        prune: `median`, or None.
        keep: `best`, or `all` trials' results.
        identity: what decides the trials: this, the recipe, the rows and the base.
    """

    out: Path
    fields: Mapping[str, Any]
    space: Space
    method: str
    metric: str
    trials: int
    seed: int
    prune: str | None
    keep: str
    identity: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        return self.out.with_name(f"{self.out.name}.sweep")

    @property
    def digest(self) -> str:
        """Tells this sweep from others; the number of trials does not count, so that there may be more later."""
        return hash_json(self.identity)

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        return "maximize" if METRICS[self.metric].greater_is_better else "minimize"

    def home(self, number: int) -> Path:
        """The folder of a trial."""
        return self.folder / "trials" / str(number)

    def result(self, number: int) -> Path:
        """The adapter (or model) of a trial; it has the name it will be known by."""
        return self.home(number) / self.out.name

    def recipe(self, number: int, params: Params) -> Recipe:
        """The recipe of a trial.

        Raises:
            RecipeError: the values do not go together.
        """
        return load_recipe(self.fields, overrides={**params, "out": str(self.result(number))})

    def better(self, one: float, other: float) -> bool:
        return one > other if self.direction == "maximize" else one < other

    # On disk

    def _write(self) -> None:
        plan = {
            "out": str(self.out),
            "fields": self.fields,
            "over": over_of(self.space),
            **{name: getattr(self, name) for name in ("method", "metric", "trials", "seed", "prune", "keep")},
            "identity": self.identity,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(self.folder / PLAN, json.dumps(plan, indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """The plan of a folder.

        Raises:
            AdapterError: there is none, or it is damaged.
        """
        found = read_json(folder / PLAN, limit=_LIMIT)
        try:
            space = space_of(found.pop("over"))
            return cls(out=Path(found.pop("out")), space=space, **found)
        except (KeyError, TypeError):
            raise AdapterError(f"{escape_text(folder / PLAN)} is damaged") from None

    def take_folder(self, *, replace: bool) -> None:
        """Make the folder this sweep's, where it is free or is so already; another sweep's goes where that was asked.

        Raises:
            RecipeError: it holds another sweep; names what differs.
            StorageError: a process is at work on that one.
        """
        with FileLock(self.folder / LOCKS / "sweep").held():
            if self.check_folder(replace=replace):
                self._clear()
            self._write()

    def check_folder(self, *, replace: bool) -> list[str]:
        """What differs from the sweep that the folder holds.

        Raises:
            RecipeError: something does, and that sweep is not to be replaced.
        """
        if not exists(self.folder / PLAN):
            return []
        try:
            told = list(describe_differences(Plan.read(self.folder).identity, self.identity))
        except AdapterError as error:
            told = [error.message]
        if told and not replace:
            raise RecipeError(
                f"{escape_text(self.folder)} holds another sweep:\n  " + "\n  ".join(told),
                hint="go back to that one to go on with it, or ask to replace (--replace) to start anew",
            )
        return told

    def _clear(self) -> None:
        locks = [FileLock(path) for path in (self.folder / LOCKS).iterdir() if path.name.isdecimal()]
        if not all(lock.is_free for lock in locks):
            raise StorageError(f"another process works on {escape_text(self.folder)}", hint="wait for it, or stop it")
        for entry in self.folder.iterdir():
            if entry.name != LOCKS:  # which this process holds one of
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def shares_base(recipe: Recipe) -> bool:
    """Whether trainings of a recipe can have one base, loaded once; the others load what they will change."""
    return recipe.dtype == "auto" and recipe.quantize is None and recipe.method not in METHODS_CHANGING_BASE


def over_of(space: Space) -> dict[str, Any]:
    """A space as JSON values, which `space_of` reads again."""
    return {key: values.to_json() for key, values in space.items()}


def sums_of_files(space: Space) -> dict[str, str]:
    """sha256 of the files of rows that are swept over, by path: another file of that name is another sweep."""
    paths = space.get("data.train")
    if not isinstance(paths, Choices):
        return {}
    return {str(path): _sha256(Path(str(path))) for path in paths.values}


def _sha256(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise RecipeError(f"data.train {escape_text(path)} is not a file")
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RecipeError(f"data.train {escape_text(path)} cannot be read: {error.strerror}") from None
