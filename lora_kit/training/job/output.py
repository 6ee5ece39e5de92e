"""The output of a training, checked before any work is done, and the names of the files in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from lora_kit.adapter.folder import is_adapter_folder
from lora_kit.data.mixture import list_files
from lora_kit.errors import RecipeError, StorageError
from lora_kit.io.atomic_write import check_output
from lora_kit.io.output_overlap import refuse_overlap
from lora_kit.io.output_path import check_path
from lora_kit.io.text import escape_text
from lora_kit.names import RECIPE_FILE
from lora_kit.training.recipe.recipe import Recipe

REPORT_FILE: Final = "report.html"
LOSS_CURVE_FILE: Final = "loss.png"


def check_output_writable(recipe: Recipe) -> None:
    """Reject an output without a name, or that cannot be written: before hours of training, not after.

    Raises:
        RecipeError: the output has no name.
        StorageError: it cannot be written.
    """
    if not recipe.name:
        raise RecipeError(f"out {recipe.out!r} has no name", hint="its last part is the adapter's name")
    out = Path(recipe.out)
    check_path(out)
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise StorageError(f"{escape_text(out)} is inside {escape_text(parent)}, which is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise StorageError(f"{escape_text(out)} cannot be written: no permission to write to {escape_text(parent)}")


def check_output_available(recipe: Recipe, *, replace: bool) -> None:
    """Reject an output that exists and may not be replaced, or that is not apart from what the training reads.

    Raises:
        StorageError: what is in the way.
    """
    refuse_inputs(recipe)
    out = Path(recipe.out)
    check_output(out, replace=replace, owned=is_trained_model_folder if recipe.method == "full" else is_adapter_folder)


def refuse_inputs(recipe: Recipe) -> None:
    """Reject an output that is not apart from what the training reads. A folder of data may hold it.

    Raises:
        StorageError: it is an input, lies in one, or has one in it.
    """
    sources = [source for source in (recipe.data.train, recipe.data.validation) if source is not None]
    rows = [file.path for source in sources for file in list_files(source) if os.path.isfile(file.path)]
    others = (recipe.base, recipe.start_from, recipe.data.chat_template)
    refuse_overlap(Path(recipe.out), [*rows, *filter(None, others)])


def is_trained_model_folder(folder: Path) -> bool:
    """Return whether a folder is the result of `method: full`, which may be replaced."""
    return (folder / RECIPE_FILE).is_file() and (folder / "config.json").is_file()
