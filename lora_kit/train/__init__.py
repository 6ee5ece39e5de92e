"""Training from a recipe: `train(recipe)` writes an adapter folder and says what it did."""

from lora_kit._callable import make_callable
from lora_kit.train.planning import plan
from lora_kit.train.plans import Plan
from lora_kit.train.reading import load_recipe
from lora_kit.train.recipe import DataSpec, Recipe
from lora_kit.train.report import TrainReport
from lora_kit.train.run import train

__all__ = ["DataSpec", "Plan", "Recipe", "TrainReport", "load_recipe", "plan", "train"]

make_callable(__name__)
