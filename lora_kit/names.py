"""Names that several rooms share. No import of torch here: the command line shows them in its help."""

from __future__ import annotations

from pathlib import Path
from typing import Final

DEFAULT_STORE: Final = Path("adapters")
"""The adapter store: the folder, in the working directory, in which adapters are looked up by name."""
KIT_BASE: Final = "kit-base"
"""The base model that is part of the package, see `lora_kit.models.kit_base`."""
SHIPPED_ADAPTERS: Final = ("mood", "pirate", "scene")
"""The adapters that come with the package; see `lora_kit.demo.shipped_adapters`."""
CHECKPOINT_FILE: Final = "checkpoint.json"
"""The file of a checkpoint that is written last; see `lora_kit.training.loop.checkpoints`."""
TEST_FILE: Final = "test.jsonl"
"""The rows that a preparation of data set aside for a test."""
RECIPE_FILE: Final = "recipe.yaml"
"""The recipe in a folder that a training or a preparation of data wrote."""
CHAT_TEMPLATE_FILE: Final = "chat_template.jinja"
"""The chat template beside an adapter or of a model, under the name that transformers and servers look for."""
REWARD_OBJECTIVE: Final = "reward"
"""The objective of a recipe that trains a model to score answers; see `lora_kit.training.recipe.objectives`."""
THREAD_PREFIX: Final = "adapter "
"""Names of the threads in which several adapters are trained begin with it; the adapter's name follows."""
METRICS_FILE: Final = "metrics.jsonl"
"""The log of a training, one JSON object a line: in its result, and as it goes in the folder of its checkpoints."""
RUN_SUFFIX: Final = ".run"
"""The checkpoints and the log of a training to `sql` are in the folder `sql.run` beside it."""
SWEEP_SUFFIX: Final = ".sweep"
"""A sweep of the output `sql` is in the folder `sql.sweep` beside it."""
