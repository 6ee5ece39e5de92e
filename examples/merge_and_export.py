"""Ship an adapter: check it for a server, export it, merge it into the base: python examples/merge_and_export.py"""

from __future__ import annotations

from pathlib import Path

import transformers

import lora_kit as lk

ADAPTER = Path(__file__).parents[1] / "adapters" / "pirate"


def main() -> None:
    """Write the adapter as vLLM reads it, and a whole model that needs nothing of this library."""
    exported = lk.export(ADAPTER, "vllm", "out/pirate-vllm", replace=True)
    print("for vLLM:", exported.out)
    report = lk.merge("kit-base", ADAPTER, "merged/pirate", dtype="fp32", replace=True)
    print(f"merged: {report.retention:.1%} of the update survived rounding")
    model = transformers.AutoModelForCausalLM.from_pretrained("merged/pirate")
    print(f"transformers reads {model.num_parameters():,} weights")


if __name__ == "__main__":
    main()
