"""What does an adapter cost where nothing is trained: forward, prefill and decoding, up to one adapter per row?

The floor is the same model without a bank. Decoding is `generate`, greedy, 24 new tokens after a prompt of 16; prefill
is one forward of 64 tokens a row. Rows take the adapters in a random order, and routing them is part of the time:
between two calls lora_kit serves other rows, since for the same rows again it would find everything ready. Before
anything is timed, lora_kit's logits are compared with PEFT's, and with the base's, from which they must differ where a
row uses an adapter.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor

from benchmarks.harness import Case, Effort, Row, ratios
from benchmarks.models import adapters, bank_of, in_peft, llama, token_ids

CASES: Final = ("frozen base", "lora_kit", "peft")
LENGTH: Final = {"forward": 256, "prefill": 64, "decode": 16}
NEW_TOKENS: Final = 24


@dataclass(frozen=True)
class Batch:
    """A batch and who its rows use.

    Attributes:
        work: forward (`use`: one adapter for all rows), prefill (one forward, routed) or decode (`generate`, routed).
        rows: of the batch.
        adapters: different ones among the rows.
        ranks: the adapters have these in turn.
        on_base: how many of the rows use the base.
    """

    work: Literal["forward", "prefill", "decode"]
    rows: int
    adapters: int
    ranks: tuple[int, ...] = (16,)
    dtype: str = "fp32"
    on_base: Literal["none", "half"] = "none"
    variant: Literal["LoRA", "DoRA"] = "LoRA"

    @property
    def label(self) -> str:
        plural = "s" if self.adapters > 1 else ""
        ranks = "" if len(self.ranks) == 1 else f", ranks {' and '.join(map(str, self.ranks))}"
        base = ", half of the rows on the base" if self.on_base == "half" else ""
        variant = "" if self.variant == "LoRA" else f", {self.variant}"
        return f"{self.work} {self.adapters} adapter{plural} in {self.rows} rows{ranks}{base}, {self.dtype}{variant}"

    @property
    def names(self) -> list[str | None]:
        """The adapter of each row, in a random order that is the same at every call."""
        names: list[str | None] = [f"a{row % self.adapters}" for row in range(self.rows)]
        if self.on_base == "half":
            names = [*names[: self.rows // 2], *[None] * (self.rows - self.rows // 2)]
        random.Random(0).shuffle(names)
        return names


def batches() -> dict[Batch, tuple[Literal["short", "full"], float | None]]:
    """What is measured: whether in the short form, and the aim."""
    return {
        Batch("forward", 4, 1): ("short", None),
        Batch("forward", 4, 1, dtype="bf16"): ("full", None),
        Batch("forward", 4, 1, variant="DoRA"): ("full", None),
        Batch("decode", 8, 1, variant="DoRA"): ("full", None),
        Batch("prefill", 8, 1): ("full", None),
        Batch("prefill", 8, 8): ("short", 1.10),
        Batch("prefill", 8, 8, dtype="bf16"): ("full", None),
        Batch("prefill", 32, 32): ("full", None),
        Batch("prefill", 8, 4, on_base="half"): ("full", None),
        Batch("prefill", 8, 8, ranks=(8, 64)): ("full", None),
        Batch("decode", 8, 1): ("short", None),
        Batch("decode", 8, 8): ("short", 1.25),
        Batch("decode", 8, 8, dtype="bf16"): ("full", None),
        Batch("decode", 32, 1): ("full", None),
        Batch("decode", 32, 8): ("full", None),
        Batch("decode", 32, 32): ("short", 1.35),
        Batch("decode", 32, 32, dtype="bf16"): ("full", None),
        Batch("decode", 8, 4, on_base="half"): ("short", None),
        Batch("decode", 32, 16, on_base="half"): ("full", None),
        Batch("decode", 8, 8, ranks=(8, 64)): ("short", None),
        Batch("decode", 32, 32, ranks=(8, 64)): ("full", None),
    }


@torch.inference_mode()
def forward(model: Any, ids: Tensor, **more: Any) -> Tensor:
    """Logits of all positions."""
    return model(input_ids=ids, use_cache=False, **more).logits


@torch.inference_mode()
def last_step(model: Any, ids: Tensor, **more: Any) -> Tensor:
    """Logits of the last position, computed as decoding does: one token a row on top of a cache."""
    cache = model(input_ids=ids[:, :-1], use_cache=True, **more).past_key_values
    return model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True, **more).logits


@torch.inference_mode()
def generate(model: Any, ids: Tensor, **more: Any) -> Tensor:
    """Tokens, greedily."""
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **more)


Work = Callable[..., Tensor]
TIMED: Final[dict[str, Work]] = {"forward": forward, "prefill": forward, "decode": generate}
CHECKED: Final[dict[str, Work]] = {"forward": forward, "prefill": forward, "decode": last_step}


@dataclass(frozen=True)
class Cases:
    """What is compared, each with a model of its own with the same weights.

    Attributes:
        work: a case by name; it takes what is to be done with its model.
        reroute: has lora_kit forget which rows it served last.
    """

    work: Mapping[str, Callable[[Work], Tensor]]
    reroute: Callable[[], None]


def build(batch: Batch) -> Cases:
    ids = token_ids(batch.rows, LENGTH[batch.work])
    ranks = [batch.ranks[number % len(batch.ranks)] for number in range(batch.adapters)]
    made = adapters(llama(), ranks, use_dora=batch.variant == "DoRA")
    values = {f"a{number}": value for number, value in enumerate(made)}
    base, ours, theirs = (llama(dtype=batch.dtype).requires_grad_(False) for _ in range(3))
    bank, wrapped = bank_of(ours, values), in_peft(theirs, values).eval()
    # One adapter for all rows is no mixed batch for PEFT either: it is active already, and that is the faster way.
    by_row = {"adapter_names": [name or "__base__" for name in batch.names]} if len(set(batch.names)) > 1 else {}

    def routed(work: Work) -> Tensor:
        with bank.using("a0") if batch.work == "forward" else bank.rows(batch.names):
            return work(ours, ids)

    def reroute() -> None:
        with bank.rows(["a0", None]):
            pass

    work = {
        "frozen base": lambda work: work(base, ids),
        "lora_kit": routed,
        "peft": lambda work: work(wrapped, ids, **by_row),
    }
    return Cases(work, reroute)


def check(batch: Batch, cases: Cases) -> None:
    """Each row has PEFT's logits, and the base's only where it uses the base."""
    base, own, other = (cases.work[name](CHECKED[batch.work]).double() for name in CASES)
    bound = 1e-4 if batch.dtype == "fp32" else 0.05
    for row, name in enumerate(batch.names):
        error = float((own[row] - other[row]).norm() / other[row].norm())
        effect = float((other[row] - base[row]).norm() / base[row].norm())
        if error > bound:
            raise ValueError(f"{batch.label}: row {row} differs from PEFT's by {error:.1e} of its size")
        if (effect > 4 * bound) != (name is not None):
            raise ValueError(f"{batch.label}: row {row} ({name}) differs from the base's by {effect:.1e} of its size")


def timed(batch: Batch, effort: Effort) -> dict[str, Any]:
    cases = build(batch)
    check(batch, cases)
    timings = {name: Case(partial(run, TIMED[batch.work]), cases.reroute) for name, run in cases.work.items()}
    return {"timings": effort.compare(timings)}


def rows() -> dict[str, Row]:
    return {batch.label: Row(partial(timed, batch), short, aim) for batch, (short, aim) in batches().items()}


def page(results: Mapping[str, Any]) -> str:
    intro = "Time over that of the same model without a bank: median over the rounds, and its quartiles."
    return f"{intro}\n\n{ratios({name: row['timings'] for name, row in results.items()}, CASES)}"
