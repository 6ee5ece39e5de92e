"""Training step, decoding and prefill beside the frozen base and PEFT, on the same work in the same run.

    python -m benchmarks.speed.speed            # measure; write the result and the table
    python -m benchmarks.speed.speed --quick    # fewer rounds, nothing written

A Llama of 8 layers of width 512 with random weights, r=16 on all linear layers. The floor of a training step is the
frozen base: forward, loss, and the gradient to its input. No optimiser step is timed. That a case computes what PEFT
computes is checked before it is timed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import transformers
from torch import Tensor

import lora_kit as lk
from benchmarks.harness import Timing, alternate, write

README: Final = Path(__file__).resolve().parent / "README.md"
R, ALPHA = 16, 32
TARGETS: Final = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TRAIN_BATCH, TRAIN_LENGTH = 4, 256
PREFILL_LENGTH, PROMPT_LENGTH, NEW_TOKENS = 64, 16, 24


def model(dtype: torch.dtype) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        vocab_size=2048,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    made: Any = transformers.LlamaForCausalLM(config)
    return made.to(dtype)


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(3, 2048, (rows, length), generator=torch.Generator().manual_seed(1))


def adapters(count: int) -> list[lk.Adapter]:
    """Adapters that do something, each another."""
    bank = lk.attach(model(torch.float32), dtype=torch.float32)
    config = lk.LoraConfig(r=R, lora_alpha=ALPHA, init_lora_weights=False)
    made = []
    for _ in range(count):
        bank.add("a", config)
        with torch.no_grad():
            for parameter in bank.parameters("a"):
                parameter.mul_(0.1)
        made.append(bank.snapshot("a"))
        bank.unload("a")
    return made


def in_peft(base: Any, values: list[lk.Adapter]) -> peft.PeftModel:
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(base, config, adapter_name="a0")
    for number, value in enumerate(values):
        if number:
            wrapped.add_adapter(f"a{number}", config)
        peft.set_peft_model_state_dict(wrapped, dict(value.tensors), adapter_name=f"a{number}")
    return wrapped


def training(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    inputs = ids(TRAIN_BATCH, TRAIN_LENGTH)
    value = adapters(1)[0]
    frozen = model(dtype).train().requires_grad_(False)
    embedded = frozen.get_input_embeddings()(inputs).detach().requires_grad_()
    ours, theirs, full = model(dtype).train(), in_peft(model(dtype), [value]).train(), model(dtype).train()
    bank = lk.attach(ours, lk.LoraConfig(r=R, lora_alpha=ALPHA), name="a0")
    bank.restore("a0", value)
    losses = [each(input_ids=inputs, labels=inputs).loss.item() for each in (ours, theirs)]
    assert abs(losses[0] - losses[1]) < (1e-4 if dtype == torch.float32 else 0.05), losses

    def step(each: Any, **more: Tensor) -> Callable[[], None]:
        def run() -> None:
            each(**more, labels=inputs).loss.backward()
            for parameter in each.parameters():
                parameter.grad = None
            embedded.grad = None

        return run

    return {
        "frozen base": step(frozen, inputs_embeds=embedded),
        "lora_kit": step(ours, input_ids=inputs),
        "peft": step(theirs, input_ids=inputs),
        "full fine-tuning": step(full, input_ids=inputs),
    }


def mixed(count: int, how: str) -> dict[str, Callable[[], Any]]:
    """A batch with a different adapter in every row: `decode` by generating, or `prefill` by one forward."""
    values = adapters(count)
    base, ours, theirs = model(torch.float32).eval(), model(torch.float32).eval(), model(torch.float32)
    names = [f"a{number}" for number in range(count)]
    bank = lk.attach(ours, slots=count, max_rank=R)
    for name, value in zip(names, values, strict=True):
        bank.load(name, value)
    wrapped = in_peft(theirs, values).eval()
    inputs = ids(count, PROMPT_LENGTH if how == "decode" else PREFILL_LENGTH)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}

    @torch.inference_mode()
    def run(each: Any, **more: Any) -> Tensor:
        if how == "decode":
            return each.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), **options, **more)
        return each(input_ids=inputs, **more).logits

    def routed() -> Tensor:
        with bank.rows(names):
            return run(ours)

    cases = {
        "frozen base": lambda: run(base),
        "lora_kit": routed,
        "peft": lambda: run(wrapped, adapter_names=names),
    }
    if how == "prefill":
        torch.testing.assert_close(routed(), cases["peft"](), rtol=1e-3, atol=1e-3)
    return cases


WORK: Final[dict[str, Callable[[], dict[str, Callable[[], Any]]]]] = {
    "training step, fp32": lambda: training(torch.float32),
    "training step, bf16": lambda: training(torch.bfloat16),
    "decode, batch 8, 8 different adapters": lambda: mixed(8, "decode"),
    "decode, batch 32, 32 different adapters": lambda: mixed(32, "decode"),
    "prefill 8x64, 8 different adapters": lambda: mixed(8, "prefill"),
}


def table(result: dict[str, dict[str, Timing]]) -> str:
    columns = ["frozen base", "lora_kit", "peft", "full fine-tuning"]
    lines = [f"| time over that of the frozen base | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for work, timings in result.items():
        cells = [f"{timings[name].ratio:.2f}" if name in timings else "-" for name in columns]
        cells[0] += f" ({timings['frozen base'].median * 1e3:.0f} ms)"
        lines.append(f"| {work} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    rounds = 5 if arguments.quick else 9
    result = {work: alternate(cases(), rounds=rounds) for work, cases in WORK.items()}
    print(table(result))
    if not arguments.quick:
        write("speed", {"rounds": rounds, "work": result})
        README.write_text(f"# Speed beside PEFT\n\n{(__doc__ or '').strip()}\n\n{table(result)}\n")


if __name__ == "__main__":
    main()
