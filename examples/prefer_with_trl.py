"""DPO with TRL's trainer; the reference is the model without its adapter: python examples/prefer_with_trl.py"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import lora_kit as lk

DATA = Path(__file__).parent / "data" / "preferences.jsonl"


def main(steps: int = 10) -> None:
    """Train on pairs of answers; `objective: dpo` in a recipe does the same without a script."""
    base = lk.load_base("kit-base", dtype="fp32")
    bank = lk.attach(base.model, lk.LoraConfig(r=8, lora_alpha=16), name="polite")
    rows = [json.loads(line) for line in DATA.read_text("utf-8").splitlines()]
    trainer = DPOTrainer(
        base.model,
        ref_model=bank.reference(),  # the base, bit for bit, in the same memory
        args=DPOConfig("trained", max_steps=steps, learning_rate=1e-3, save_strategy="no", report_to="none",
                       per_device_train_batch_size=2, disable_tqdm=True, use_cpu=not torch.cuda.is_available()),
        train_dataset=Dataset.from_list(rows),
        processing_class=base.tokenizer,
    )  # fmt: skip
    print(f"loss {trainer.train().training_loss:.3f}; {0.693:.3f} is a model that prefers nothing")
    bank.save("polite", "adapters/polite")


if __name__ == "__main__":
    main()
