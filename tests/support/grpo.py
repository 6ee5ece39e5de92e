"""Prompts, reward functions and recipes for a tiny base that learns from answers of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.training import recipe_of

PROMPTS = [
    {"prompt": prompt, "target": target}
    for prompt, target in (("one ", 1), ("a longer prompt ", 2), ("b ", 3), ("cc ", 4), ("e ", 5), ("f g ", 6))
]
REWARDS = """
def lower(completions, **kwargs):
    return [sum(each.islower() for each in text) / 4 for text in completions]

def short(prompts, completions, completion_ids, target, trainer_state, **kwargs):
    assert len(prompts) == len(completions) == len(completion_ids) == len(target)
    return [None if given == 1 else -len(ids) / 8 for ids, given in zip(completion_ids, target)]
"""


def grpo_recipe(folder: Path, *, code: str = REWARDS, rewards: Any = "lower", **changes: Any) -> dict[str, Any]:
    """Return a recipe of a few steps; `rewards` names functions of a file that is written into the folder."""
    file = folder / "rewards.py"
    file.write_text(code, "utf-8")
    named = [rewards] if isinstance(rewards, str) else rewards
    section = {
        "logging_steps": 1,
        "learning_rate": 2e-2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        **changes.pop("train", {}),
    }
    options = {"rows": PROMPTS, "lora": {"r": 4, "lora_alpha": 8}, "steps": 4, **changes}
    recipe = recipe_of(folder, objective="grpo", train=section, **options)
    recipe["data"] |= {"separator": "", "max_length": 48}
    recipe["rewards"] = [f"{file}:{name}" if isinstance(name, str) else name for name in named]
    return recipe
