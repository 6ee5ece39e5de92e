"""Swapping, loading and starting: what it costs to change adapters, beside PEFT on the same model in the same run.

    python -m benchmarks.control.control            # measure and write the result and the table
    python -m benchmarks.control.control --quick    # fewer repetitions, nothing written

The model is a Llama of 32 layers with all seven linears adapted (224 layers), narrow, since width does not matter here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import lora_kit as lk
from benchmarks.harness import median_us, write

README: Final = Path(__file__).resolve().parent / "README.md"
RESIDENT: Final = (2, 64)
PEFT_RESIDENT: Final = (2, 16)
"""PEFT's loads grow with the adapters loaded: 64 of them would take minutes."""


def model() -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=32, num_attention_heads=4, vocab_size=64
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def alternating(use: Callable[[str], Any]) -> Callable[[], None]:
    """A call that swaps between two adapters each time, so that no swap is a repetition."""
    names = ["a0", "a1"]

    def swap() -> None:
        names.reverse()
        use(names[0])

    return swap


def ours(folder: Path, resident: int, repetitions: int) -> dict[str, Any]:
    bank = lk.attach(model(), slots=resident, max_rank=8)
    loads = []
    for number in range(resident):
        started = time.perf_counter()
        bank.load(f"a{number}", folder)
        loads.append((time.perf_counter() - started) * 1e3)
    return {
        "resident": resident,
        "swap_us": median_us(alternating(bank.use), repetitions=repetitions),
        "load_ms_first": loads[0],
        "load_ms_second": loads[1],
        "load_ms_last_five": statistics.median(loads[-5:]),
    }


def peft_(folder: Path, resident: int, repetitions: int) -> dict[str, Any]:
    import peft

    wrapped, loads = None, []
    for number in range(resident):
        started = time.perf_counter()
        if wrapped is None:
            wrapped = peft.PeftModel.from_pretrained(model(), folder, adapter_name="a0")
        else:
            wrapped.load_adapter(folder, adapter_name=f"a{number}")
        loads.append((time.perf_counter() - started) * 1e3)
    assert wrapped is not None
    return {
        "resident": resident,
        "swap_us": median_us(alternating(wrapped.set_adapter), repetitions=max(5, repetitions // 20)),
        "load_ms_first": loads[0],
        "load_ms_second": loads[1],
        "load_ms_last_five": statistics.median(loads[-5:]),
    }


def seconds(command: list[str], repetitions: int) -> float:
    """Median wall time of a whole process."""
    times = []
    for _ in range(repetitions + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def startup(repetitions: int) -> dict[str, float]:
    """What importing costs beyond torch, with everything of the public names behind it, and `lora-kit --help`."""
    python = sys.executable
    torch_alone = seconds([python, "-c", "import torch"], repetitions)
    with_kit = seconds([python, "-c", "import torch, lora_kit"], repetitions)
    with_core = seconds([python, "-c", "import torch, lora_kit; lora_kit.attach, lora_kit.Adapter"], repetitions)
    return {
        "import_torch_s": torch_alone,
        "import_lora_kit_beyond_torch_s": with_kit - torch_alone,
        "attach_and_adapter_beyond_torch_s": with_core - torch_alone,
        "help_s": seconds([str(Path(python).with_name("lora-kit")), "--help"], repetitions),
    }


def measured(repetitions: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "a"
        bank = lk.attach(model(), lk.LoraConfig(r=8, init_lora_weights=False), name="a")
        bank.save("a", folder)
        return {
            "lora_kit": [ours(folder, count, repetitions) for count in RESIDENT],
            "peft": [peft_(folder, count, repetitions) for count in PEFT_RESIDENT],
            "startup": startup(max(3, repetitions // 50)),
            "repetitions": repetitions,
        }


def table(result: dict[str, Any]) -> str:
    lines = ["| | adapters loaded | one swap | load: first | second | last |", "|---|---|---|---|---|---|"]
    for name in ("lora_kit", "peft"):
        for row in result[name]:
            loads = " | ".join(f"{row[key]:.0f} ms" for key in ("load_ms_first", "load_ms_second", "load_ms_last_five"))
            lines.append(f"| {name} | {row['resident']} | {row['swap_us']:,.1f} µs | {loads} |")
    start = result["startup"]
    lines += [
        "",
        "| whole process | |",
        "|---|---|",
        f"| `import torch` | {start['import_torch_s']:.2f} s |",
        f"| `import lora_kit`, beyond torch | {start['import_lora_kit_beyond_torch_s']:.2f} s |",
        f"| `lora_kit.attach`, `lora_kit.Adapter`, beyond torch | {start['attach_and_adapter_beyond_torch_s']:.2f} s |",
        f"| `lora-kit --help` | {start['help_s']:.2f} s |",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    result = measured(60 if arguments.quick else 400)
    print(table(result))
    if not arguments.quick:
        write("control", result)
        README.write_text(f"# Swapping, loading, starting\n\n{(__doc__ or '').strip()}\n\n{table(result)}\n")


if __name__ == "__main__":
    main()
