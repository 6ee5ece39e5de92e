"""Training from a recipe: `train(recipe)` writes an adapter folder and says what it did."""

from __future__ import annotations

import sys
import types
from typing import Any

from lora_kit.train.evaluate import Evaluation, evaluate
from lora_kit.train.recipe import DataSpec, Recipe, load_recipe
from lora_kit.train.run import TrainReport, train

__all__ = ["DataSpec", "Evaluation", "Recipe", "TrainReport", "evaluate", "load_recipe", "train"]


class _CallableModule(types.ModuleType):
    # Importing this package makes `lora_kit.train` the package, whatever the name meant before; to call it must train
    # all the same.
    def __call__(self, *args: Any, **kwargs: Any) -> TrainReport:
        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
