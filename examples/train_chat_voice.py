"""Teach a voice from conversations, and hear it beside the base: python examples/train_chat_voice.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lora_kit as lk
from lora_kit.generation.decoding import Sampling
from lora_kit.generation.generate import generate

RECIPE = {
    "base": "kit-base",
    "data": {"train": str(Path(__file__).parent / "data" / "chats.jsonl"), "chat_template": "plain"},
    "lora": {"r": 16, "lora_alpha": 32},
    "train": {"num_train_epochs": 5, "learning_rate": 2e-3, "per_device_train_batch_size": 8},
    "out": "adapters/mara",
}


def main(base: str = "kit-base", **limits: Any) -> None:
    """Train on the conversations; the loss is on the answers alone."""
    trained = lk.train(RECIPE, overrides={"base": base, **limits}, replace=True)
    print(f"training loss {trained.train_loss:.2f}")
    said = generate(base, [None, trained.out], "Can I sail today?", sampling=Sampling(max_new_tokens=24))
    for name, answer in zip(("base", "mara"), said, strict=True):
        print(f"{name}: {answer.text.strip()}")


if __name__ == "__main__":
    main()
