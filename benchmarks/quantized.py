"""What does training on a quantized base cost, beside the same base in 16 bits?

A Llama with random weights, loaded in bf16 and quantized by bitsandbytes while it is loaded; an adapter of rank 16 on
all linears; steps of AdamW on 2 × 128 tokens, without gradient checkpointing. lora_kit and PEFT train the same
adapter on the same base, each case in a process of its own with one thread. Memory is anonymous memory in use above
what the imports take; the weights are copied out of their mapped file, so that they count. The losses must be the
same within 1e-3. Processor time is of the last step; bitsandbytes' kernels for a CPU decide it.
"""

from __future__ import annotations

import gc
import importlib
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

import lora_kit as lk
from benchmarks.harness import MEMORY_IN_USE, Effort, Row, in_own_process, table
from benchmarks.merge import anonymous, anonymous_peak
from benchmarks.models import adapters, llama, lora, token_ids

CASES: Final = ("lora_kit", "peft")
FORMS: Final = ("bf16", "nf4", "nf4-double", "int8")
R: Final = 16
STEPS: Final = 3
_LOSS: Final = 1e-3
_ALONE: Final = {**MEMORY_IN_USE, "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Size:
    """A base to train on."""

    width: int
    layers: int

    @property
    def label(self) -> str:
        return f"{self.layers} layers of {self.width}"


SMALL: Final = Size(512, 4)
LARGE: Final = Size(1536, 10)


def prepare(place: Path, size: Size) -> None:
    """A base with kit-base's tokenizer, and an adapter for it."""
    from lora_kit.models.loading import load_base

    model = llama(width=size.width, layers=size.layers, dtype="bf16")
    model.save_pretrained(place / "base")
    load_base("kit-base").tokenizer.save_pretrained(place / "base")
    adapters(model, [R])[0].save(place / "adapter")


def ours(model: Any, adapter: Path) -> tuple[Any, list[torch.nn.Parameter]]:
    bank = lk.attach(model, lora(R), name="a")
    bank.restore("a", lk.Adapter.load(adapter))
    return model, bank.parameters("a")


def theirs(model: Any, adapter: Path) -> tuple[Any, list[torch.nn.Parameter]]:
    import peft

    wrapped: Any = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    return wrapped, [parameter for parameter in wrapped.parameters() if parameter.requires_grad]


WAYS: Final[dict[str, Callable[[Any, Path], tuple[Any, list[torch.nn.Parameter]]]]] = {
    "lora_kit": ours,
    "peft": theirs,
}


def once(case: str, form: str, place: Path) -> dict[str, Any]:
    """One training of a few steps. Run in a process of its own.

    Returns:
        bytes of the loaded model, the most while it is loaded and while it trains; losses; processor seconds of a step.
    """
    from lora_kit.models.loading import load_base

    for module in ("transformers.models.llama.modeling_llama", "peft", "bitsandbytes"):
        importlib.import_module(module)
    before, quantize = anonymous(), None if form == "bf16" else form
    with anonymous_peak() as loading:
        model = load_base(place / "base", device="cpu", quantize=quantize).model
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        model, parameters = WAYS[case](model, place / "adapter")
    gc.collect()
    loaded = anonymous() - before
    with anonymous_peak() as training:
        losses, seconds = trained(model, parameters)
    return {
        "loaded": loaded,
        "loading": loading[0],
        "training": loaded + training[0],
        "losses": losses,
        "processor_seconds": seconds,
    }


def trained(model: Any, parameters: list[torch.nn.Parameter]) -> tuple[list[float], float]:
    """Losses of a few steps, and the processor seconds of the last one."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    ids, losses, seconds = token_ids(2, 128), list[float](), 0.0
    model.train()
    for _ in range(STEPS):
        started = time.process_time()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds = time.process_time() - started
    return losses, seconds


def compared(effort: Effort, *, size: Size) -> dict[str, Any]:
    """Every form of the base, both cases; memory does not change from one run to the next, so each runs once."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        in_own_process(prepare, place, size)
        for form in FORMS:
            cases = effort.of(CASES)
            runs = {case: in_own_process(once, case, form, place, environment=_ALONE) for case in cases}
            found[form] = runs
            if len(runs) == len(CASES):
                check(form, runs)
    return {"forms": found, "weights": weights(size)}


def check(form: str, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """The same loss in every step, and lower at the end."""
    own, other = (runs[case]["losses"] for case in CASES)
    assert own[-1] < own[0], (form, own)
    for step, (mine, its) in enumerate(zip(own, other, strict=True), start=1):
        assert abs(mine - its) <= _LOSS * its, f"{form}: step {step}: {mine} and {its}"


def weights(size: Size) -> int:
    """Weights of the base."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in llama(width=size.width, layers=size.layers).parameters())


def rows() -> dict[str, Row]:
    return {
        f"training, {SMALL.label}": Row(partial(compared, size=SMALL), "short only"),
        f"training, {LARGE.label}": Row(partial(compared, size=LARGE)),
    }


def page(results: Mapping[str, Any]) -> str:
    return "\n\n".join(_section(label, row) for label, row in results.items())


def _section(label: str, row: Mapping[str, Any]) -> str:
    head = ["base", "", "loaded", "most in training", "of bf16", "most in loading", "processor time of a step", "loss"]
    lines, plain = [], row["forms"]["bf16"]
    for form, runs in row["forms"].items():
        for case, run in runs.items():
            share = run["training"] / plain[case]["training"]
            losses = f"{run['losses'][0]:.4f} → {run['losses'][-1]:.4f}"
            cells = [
                _megabytes(run["loaded"]),
                _megabytes(run["training"]),
                f"{share:.2f} ×",
                _megabytes(run["loading"]),
            ]
            lines.append([form if case == CASES[0] else "", case, *cells, f"{run['processor_seconds']:.1f} s", losses])
    return f"{label}, {row['weights'] / 1e6:,.0f} million weights:\n\n{table(head, lines)}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
