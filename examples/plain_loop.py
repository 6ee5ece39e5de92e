"""A training loop of your own: python examples/plain_loop.py"""

from __future__ import annotations

import csv
from pathlib import Path

import torch

import lora_kit as lk

ROWS = list(csv.DictReader((Path(__file__).parent / "data" / "questions.csv").open(encoding="utf-8")))


def main(steps: int = 20) -> None:
    """Train an adapter; the base keeps every bit."""
    base = lk.load_base("kit-base", dtype="fp32")
    model, tokenizer = base.model, base.tokenizer
    bank = lk.attach(model, lk.LoraConfig(r=8, lora_alpha=16), name="shop")
    optimizer = torch.optim.AdamW(bank.parameters("shop"), lr=2e-3)  # the only tensors that require a gradient
    model.train()
    for step in range(steps):
        rows = [ROWS[(4 * step + n) % len(ROWS)] for n in range(4)]
        texts = [f"{row['prompt']}\n{row['completion']}{tokenizer.eos_token}" for row in rows]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(bank.parameters("shop"), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    model.eval()
    bank.save("shop", "adapters/shop")
    print(f"saved; digest {lk.Adapter.load('adapters/shop').digest[:12]}")


if __name__ == "__main__":
    main()
