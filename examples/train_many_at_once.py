"""Several adapters over one base in one pass, each as if alone: python examples/train_many_at_once.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lora_kit as lk

ROWS = str(Path(__file__).parent / "data" / "questions.csv")


def main(base: str = "kit-base", **limits: Any) -> None:
    """Train the same rows at three ranks; memory holds one base."""
    recipes = [
        {
            "base": base,
            "data": ROWS,
            "lora": {"r": rank, "lora_alpha": 2 * rank},
            "train": {"num_train_epochs": 3, "learning_rate": 2e-3, "per_device_train_batch_size": 4},
            "out": f"adapters/rank-{rank}",
        }
        for rank in (4, 8, 16)
    ]
    for report in lk.train_many(recipes, overrides=limits, replace=True):
        print(f"{report.out}: loss {report.train_loss:.3f}, {report.trainable:,} weights")


if __name__ == "__main__":
    main()
