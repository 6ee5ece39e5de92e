"""Code that trains with PEFT gets these layers with one line: python examples/adopt_peft_model.py"""

from __future__ import annotations

import peft
import torch

import lora_kit as lk


def main(steps: int = 10) -> None:
    """Train a PeftModel with the layers of this library, then give PEFT its own layers back."""
    base = lk.load_base("kit-base", dtype="fp32")
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base.model, config)
    bank = lk.adopt(model)  # the line
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    batch = base.tokenizer(["What does the kettle cost? The kettle costs 8 euros."], return_tensors="pt")
    for step in range(steps):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    bank.to_peft()
    model.save_pretrained("adapters/peft")  # PEFT's own save; lk.Adapter.load reads it too
    print("saved by PEFT, read here:", lk.Adapter.load("adapters/peft").config.r)


if __name__ == "__main__":
    main()
