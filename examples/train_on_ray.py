"""One adapter trained by all workers of a Ray cluster: python examples/train_on_ray.py (needs ray[train])"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

import lora_kit as lk

ROWS = str(Path(__file__).parent / "data" / "questions.csv")


def main(base: str = "kit-base", workers: int = 2, use_gpu: bool = False, **limits: Any) -> None:
    """Share the rows among the workers; where one dies Ray starts all of them again, and they resume.

    A worker has a working directory of its own, so paths are absolute. On several machines all see the same folders.
    """
    here = Path.cwd()
    recipe = {
        "base": base,
        "data": ROWS,
        "lora": {"r": 8, "lora_alpha": 16},
        "train": {"num_train_epochs": 3, "learning_rate": 2e-3, "per_device_train_batch_size": 2, "save_steps": 10},
        "out": str(here / "adapters" / "on-ray"),
    }
    TorchTrainer(
        lambda: lk.train(recipe, overrides=limits, replace=True),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3), storage_path=str(here / "ray-results")),
    ).fit()
    record = lk.Adapter.load(recipe["out"]).record
    print(f"{recipe['out']}: trained by {record['metrics']['processes']} processes")


if __name__ == "__main__":
    main()
