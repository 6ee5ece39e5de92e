"""What does a training of a base of 8, 70 or 405 billion parameters need on each of eight devices?

`lora_kit.training.plan.size_plan.plan_size` counts it from a config alone, here for the shapes of Llama 3. No weight
and no device is there.

    python -m benchmarks.plan_sizes --write    # result and docs/clusters.md
    python -m benchmarks.plan_sizes --table    # docs/clusters.md from the result, nothing else
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import transformers

from benchmarks.harness import README, RESULTS, environment, fill, table
from lora_kit.training.plan.size_plan import CHECKPOINTING, PLAIN, plan_size

RESULT: Final = RESULTS / "plan_sizes.json"
PAGE: Final = README.parents[1] / "docs" / "clusters.md"
MARK: Final = "plan_sizes"
GPUS: Final = "8xH200"
SHAPES: Final[Mapping[str, dict[str, Any]]] = {
    "8B": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672, "num_attention_heads": 64},
    "405B": {"hidden_size": 16384, "num_hidden_layers": 126, "intermediate_size": 53248, "num_attention_heads": 128},
}
METHODS: Final = {"lora": "bf16", "qlora": "NF4"}
"""And how their bases are stored."""


def measure(shape: str, method: str) -> dict[str, Any]:
    """Return the plan of a shape: bytes on each device, without and with gradient checkpointing."""
    config = transformers.LlamaConfig(**SHAPES[shape], num_key_value_heads=8, vocab_size=128256)
    config.architectures = ["LlamaForCausalLM"]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        plan = plan_size(Path(folder) / "config.json", gpus=GPUS, method=method, r=16, length=2048, shard=True)
    values = plan.to_json()
    return {way: values[way] for way in (PLAIN, CHECKPOINTING)}


def page(result: Mapping[str, Any]) -> str:
    """Return the table of docs/clusters.md."""
    head = ["parameters", "base", "base on each", "adapter, gradients, AdamW", "activations", "together"]
    lines = []
    for shape in SHAPES:
        for method, stored in METHODS.items():
            ways = [result["plans"][f"{shape} {method}"][way] for way in (PLAIN, CHECKPOINTING)]
            both = ["; ".join(f"{way[part] / 1e9:.1f} GB" for way in ways) for part in ("activations", "total")]
            alike = [f"{ways[0][part] / 1e9:.1f} GB" for part in ("weights", "trained")]
            rows = "; ".join(str(way["rows_that_fit"] or "none") for way in ways)
            lines.append([shape, stored, *alike, *both, rows])
    return table([*head, "rows that fit, at least"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the result and docs/clusters.md")
    parser.add_argument("--table", action="store_true", help="write docs/clusters.md from the result")
    arguments = parser.parse_args()
    if arguments.table:
        result = json.loads(RESULT.read_text(encoding="utf-8"))
    else:
        plans = {f"{shape} {method}": measure(shape, method) for shape in SHAPES for method in METHODS}
        result = {"plans": plans, **environment()}
    print(page(result))
    if arguments.write:
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if arguments.write or arguments.table:
        fill(PAGE, page(result), mark=MARK)


if __name__ == "__main__":
    main()
