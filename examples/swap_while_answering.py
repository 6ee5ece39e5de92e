"""Swap adapters while a model runs, and put several into one batch: python examples/swap_while_answering.py"""

from __future__ import annotations

from pathlib import Path

import lora_kit as lk

STORE = Path(__file__).parents[1] / "adapters"  # or what `lora-kit demo --adapters adapters` has written


def main(tokens: int = 24) -> None:
    """Answer one prompt with each adapter, then all of them in one batch."""
    base = lk.load_base("kit-base")
    bank = lk.attach(base.model, slots=4, max_rank=16)
    for name in ("pirate", "scene", "mood"):
        bank.load(name, STORE / name)

    def answer(prompts: list[str]) -> list[str]:
        batch = base.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        written = base.model.generate(**batch, do_sample=False, max_new_tokens=tokens)
        return base.tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    prompt = "The boy ran over the hill to the little church.\n"
    alone = {}
    for name in ("pirate", "scene", None):
        bank.use(name)  # one integer is written; no weight moves
        alone[name] = answer([prompt])[0]
        print(f"{name or 'base'}: {alone[name].strip()}")
    with bank.rows(["pirate", "scene", None]):  # an adapter for each row of one batch
        together = answer([prompt] * 3)
    assert together == list(alone.values())
    print("the same three answers came from one batch")


if __name__ == "__main__":
    main()
