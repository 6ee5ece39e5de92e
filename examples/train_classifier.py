"""Train a classifier of support tickets, measure it, and ask it: python examples/train_classifier.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lora_kit as lk
from lora_kit.data.preparation.prepare import prepare

DATA = Path(__file__).parent / "data" / "intents.csv"


def main(base: str = "kit-base", **limits: Any) -> None:
    """Prepare the rows, train, and predict; `limits` are recipe keys that win."""
    prepared = prepare(DATA, "data/intents", base=base, test=0.1, replace=True)
    trained = lk.train(prepared.recipe, overrides={"train.num_train_epochs": 3, **limits}, replace=True)
    tested = lk.evaluate(base, [trained.out], "data/intents/test.jsonl", metrics=["accuracy", "f1_macro"])
    print("test:", tested.results[0].metrics)
    for text in ("my lamp is broken, money back please", "the app does not know my password"):
        found = lk.predict(base, trained.out, [text])[0]
        print(f"{text!r} is {found.label}, {found.probability:.0%} sure")


if __name__ == "__main__":
    main()
