"""What does it cost to bring an update to a smaller rank?

One layer of 2048 × 2048. `resize` cuts an adapter of rank 32 to 8; `combine` makes one of rank 8 of two of rank 32;
`extract` takes the 16 leading ranks out of a difference of two weights, which is an update of rank 16 in noise of a
tenth of its size. lora_kit's times are those of `lk.resize` and `lk.combine`, with the error they measure and the
adapter they make, and of what `lk.extract` does to one tensor. Beside it: torch's SVD of the dense matrix in fp32, and
for `combine` PEFT's `add_weighted_adapter(combination_type="svd")`, which takes one as well. All end with two factors,
and are compared with the best there is, from an SVD in fp64: how much further from the whole matrix they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, Final

import torch
from torch import Tensor, nn

import lora_kit as lk
from benchmarks.harness import Effort, Row, ratios, table
from lora_kit.adapter.peft_keys import lora_weight_keys
from lora_kit.algebra.dense_svd import approximate_low_rank

Factors = tuple[Tensor, Tensor]
"""B and A of an update."""
Cases = Mapping[str, Callable[[], Factors]]
CASES: Final = ("lora_kit", "dense SVD", "peft")
N: Final = 2048
BEFORE: Final = 32
AFTER: Final = 8
TAKEN: Final = 16
BOTH: Final = (0, 1)
"""Seeds of the adapters that are combined."""
_AS_GOOD: Final = 1e-2
"""How much further than the best a result may be, for the comparison to be one of the same work."""


def low_rank(rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """B (N, rank) and A (rank, N) whose singular values fall by half every few ranks, as those of trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    b, a = (torch.linalg.qr(torch.randn(N, rank, generator=generator)).Q for _ in range(2))
    return b * 2 ** (-torch.arange(rank) / 4), a.T.contiguous()


@cache
def adapter(seed: int = 0) -> lk.Adapter:
    b, a = low_rank(BEFORE, seed)
    key_a, key_b = lora_weight_keys("layer", "linear")
    return lk.Adapter(lk.LoraConfig(r=BEFORE, lora_alpha=BEFORE, target_modules=("layer",)), {key_a: a, key_b: b})


@cache
def difference() -> Tensor:
    b, a = low_rank(TAKEN, 2)
    product = b @ a
    noise = torch.randn(N, N, generator=torch.Generator().manual_seed(3))
    return product + 0.1 * product.norm() / noise.norm() * noise


def dense(*seeds: int) -> Tensor:
    """The sum of the updates of these adapters."""
    pairs = [adapter(seed).pairs()["layer"] for seed in seeds]
    return torch.stack([pair.b @ pair.a for pair in pairs]).sum(0)


def cut(matrix: Callable[[], Tensor], rank: int) -> Factors:
    """The usual way: a whole SVD, of which the first part is kept."""
    u, s, vh = torch.linalg.svd(matrix(), full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def resized() -> Factors:
    """Every scaling of what is made is 1."""
    pair = lk.resize(adapter(), rank=AFTER).pairs()["layer"]
    return pair.b, pair.a


def combined() -> Factors:
    pair = lk.combine([(adapter(seed), 1.0) for seed in BOTH], method="svd", rank=AFTER).pairs()["layer"]
    return pair.b, pair.a


def extracted() -> Factors:
    found = approximate_low_rank(difference(), rank=TAKEN)
    return found.b, found.a


@cache
def peft_model() -> Any:
    """PEFT's model of the layer, with both adapters in it."""
    import peft

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(N, N, bias=False)

    config = peft.LoraConfig(r=BEFORE, lora_alpha=BEFORE, target_modules=["layer"])
    model: Any = peft.PeftModel(Model(), config, adapter_name="0")
    model.add_adapter("1", config)
    layer = model.base_model.model.layer
    for seed in BOTH:
        pair = adapter(seed).pairs()["layer"]
        layer.lora_A[str(seed)].weight.data.copy_(pair.a)
        layer.lora_B[str(seed)].weight.data.copy_(pair.b)
    return model


def peft_combined() -> Factors:
    model = peft_model()
    if "both" in model.peft_config:
        model.delete_adapter("both")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "both", combination_type="svd", svd_rank=AFTER)
    layer = model.base_model.model.layer
    return layer.lora_B["both"].weight.detach() * layer.scaling["both"], layer.lora_A["both"].weight.detach()


def compared(effort: Effort, *, whole: Callable[[], Tensor], rank: int, cases: Cases) -> dict[str, Any]:
    matrix = whole().double()
    best = float(torch.linalg.svdvals(matrix)[rank:].norm())
    further = {}
    for name in effort.of(cases):
        b, a = cases[name]()
        further[name] = float((matrix - b.double() @ a.double()).norm()) / best - 1
    if max(further.values()) > _AS_GOOD:
        raise ValueError(f"a result is not as good as the others: {further}")
    return {"timings": effort.compare(cases), "further": further}


def rows() -> dict[str, Row]:
    one, both = partial(dense, 0), partial(dense, *BOTH)
    resize: Cases = {"lora_kit": resized, "dense SVD": partial(cut, one, AFTER)}
    combine: Cases = {"lora_kit": combined, "dense SVD": partial(cut, both, AFTER), "peft": peft_combined}
    extract: Cases = {"lora_kit": extracted, "dense SVD": partial(cut, difference, TAKEN)}
    return {
        f"resize, rank {BEFORE} to {AFTER}": Row(partial(compared, whole=one, rank=AFTER, cases=resize), "short"),
        f"combine two, rank {BEFORE} to {AFTER}": Row(partial(compared, whole=both, rank=AFTER, cases=combine)),
        f"extract, rank {TAKEN}": Row(partial(compared, whole=difference, rank=TAKEN, cases=extract)),
    }


def page(results: Mapping[str, Any]) -> str:
    further = [[name, *(_share(row["further"].get(case)) for case in CASES)] for name, row in results.items()]
    return "\n\n".join(
        [
            "Time over lora_kit's: median over the rounds, and its quartiles.",
            ratios({name: row["timings"] for name, row in results.items()}, CASES),
            "How much further from the whole matrix than the best of its rank:",
            table(["", *CASES], further),
        ]
    )


def _share(found: float | None) -> str:
    return "–" if found is None else f"{max(found, 0.0):.1e}"
