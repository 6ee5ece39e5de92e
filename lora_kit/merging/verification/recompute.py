"""Some rows of every folded weight, as they were read back, beside base + scaling · B A computed anew in fp64.

Taken are the adapter's own tensors in the layout PEFT writes them, by state dict key: nothing of the plan, the fold or
the writing is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from lora_kit.adapter.peft_keys import LoraWeights
from lora_kit.errors import VerificationError
from lora_kit.layers.introspect import is_stored_transposed
from lora_kit.layers.parameter import is_transposed
from lora_kit.merging.checkpoint.bnb_decode import check_quantized, dequantize_rows, pick_whole_blocks
from lora_kit.merging.checkpoint.bnb_weights import QuantizedWeight
from lora_kit.merging.checkpoint.meta_model import MetaModel
from lora_kit.merging.planned_tensors import WeightedAdapter
from lora_kit.targets.coverage import LayerTarget, survey_adapter

COMPARED_ROWS: Final = 16
"""Of a tensor, evenly spaced, that are compared."""
_ROWS_PER_EXPERT: Final = 4
"""Of each expert."""
_DORA_TOLERANCE: Final = 2**-7


@dataclass(frozen=True)
class ExpectedUpdate:
    """What one adapter does to one weight."""

    target: LayerTarget
    pair: LoraWeights
    scaling: float

    @property
    def key(self) -> str:
        """Of the weight, in the model."""
        return self.target.path if self.target.kind == "parameter" else f"{self.target.path}.weight"

    def factors(self, rows: Tensor, *, expert: int, swapped: bool) -> tuple[Tensor, Tensor]:
        """(n, r) and (r, m), whose product times the scaling is what some rows gain.

        Args:
            swapped: whether rows of the weight are inputs of the layer.
        """
        a, b, rank = self.pair.a.double(), self.pair.b.double(), self.target.rank
        if self.pair.kind == "convolution":
            a, b = a.flatten(1), b.flatten(1)
        if self.pair.kind == "parameter":
            a = a.view(self.target.experts, rank, -1)[expert]
            b = b.view(len(b), rank, self.target.experts)[:, :, expert]
        return (a[:, rows].T, b.T) if swapped else (b[rows], a)


def collect_expected_updates(model: nn.Module, parts: Sequence[WeightedAdapter]) -> dict[str, list[ExpectedUpdate]]:
    """What adapters do to the weights of a model, by state dict key."""
    found: dict[str, list[ExpectedUpdate]] = {}
    for part in parts:
        pairs = part.adapter.all_pairs()
        for target in survey_adapter(model, part.adapter).targets:
            side = ExpectedUpdate(target, pairs[target.key], target.scaling * part.weight)
            found.setdefault(side.key, []).append(side)
    return found


def check_folded_weight(
    key: str,
    base: MetaModel,
    merged: MetaModel,
    sides: Sequence[ExpectedUpdate],
    packed: Mapping[str, QuantizedWeight],
    packed_now: Mapping[str, QuantizedWeight],
) -> int:
    """Raise VerificationError unless some rows of a weight are base + adapters; how many numbers that were.

    Args:
        packed: quantised weights of the base, by key. packed_now: those of the result.
    """
    module = base.model.get_submodule(key.rpartition(".")[0])
    own, found = base.values[key], merged.values[key]
    if sides[0].pair.kind == "parameter" and own.ndim == 3:
        return sum(
            _check_rows(
                f"{key}[{e}]",
                own[e],
                found[e],
                _pick_rows(own.shape[1], _ROWS_PER_EXPERT),
                sides,
                e,
                swapped=is_transposed(module),
            )
            for e in range(len(own))
        )
    again = packed_now.get(key)
    if again is None and key not in packed:
        swapped = sides[0].pair.kind != "parameter" and is_stored_transposed(module)
        dora = sides[0].pair.magnitude is not None
        if swapped and dora:  # whose lengths are those of outputs
            own, found, swapped = own.T, found.T, False
        own, found = (w.flatten(1) for w in (own, found))
        return _check_rows(key, own, found, _pick_rows(len(own), COMPARED_ROWS), sides, 0, swapped=swapped)
    rows = pick_whole_blocks(again, COMPARED_ROWS) if again else _pick_rows(len(own), COMPARED_ROWS)
    before = dequantize_rows(packed[key], rows) if key in packed else own[rows]
    wanted, bound = _compute_expected_rows(before.double(), rows, sides, 0, swapped=False)
    if again:
        exact = {} if sides[0].pair.magnitude is None else {"exact": 0.0}
        check_quantized(again, rows, wanted, **exact)
    else:
        _check_close(key, found[rows], wanted, bound)
    return wanted.numel()


def check_fused_weight(
    key: str,
    base: MetaModel,
    merged: MetaModel,
    sides: Sequence[ExpectedUpdate],
    own: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
) -> int:
    """The same of a parameter that the files hold as several tensors.

    Args:
        own: the base's tensors by their names. found: those of the result.
    """
    compared = 0
    pieces = merged.find_pieces(key)
    if pieces is None or pieces != base.find_pieces(key):
        raise VerificationError(f"{key} was written in another form than the base's")
    for name, expert, begin, _ in pieces:
        rows = _pick_rows(len(own[name]), _ROWS_PER_EXPERT)
        wanted, bound = _compute_expected_rows(own[name][rows].double(), rows + begin, sides, expert, swapped=False)
        _check_close(name, found[name][rows], wanted, bound)
        compared += wanted.numel()
    return compared


def _check_rows(
    name: str, own: Tensor, found: Tensor, rows: Tensor, sides: Sequence[ExpectedUpdate], expert: int, *, swapped: bool
) -> int:
    wanted, bound = _compute_expected_rows(own[rows].double(), rows, sides, expert, swapped=swapped)
    _check_close(name, found[rows], wanted, bound)
    return wanted.numel()


def _pick_rows(count: int, most: int) -> Tensor:
    return torch.linspace(0, count - 1, min(most, count), dtype=torch.float64).long()


def _check_close(name: str, found: Tensor, wanted: Tensor, bound: Tensor) -> None:
    """Raise VerificationError where numbers are further away than rounding may take them."""
    info = torch.finfo(found.dtype)
    bound = bound + info.eps / 2 * 1.01 * wanted.abs() + info.tiny
    off = (found.double() - wanted).abs()
    if not (off - bound).max() <= 0:
        raise VerificationError(
            f"{name.removesuffix('.weight')}: what was written is up to {float(off.max()):.3g} away from base + "
            f"adapter; rounding allows {float(bound.max()):.3g} at most"
        )


def _compute_expected_rows(
    before: Tensor, rows: Tensor, sides: Sequence[ExpectedUpdate], expert: int, *, swapped: bool
) -> tuple[Tensor, Tensor]:
    """Some rows of base + adapters in fp64, and how far a sum of them in fp32 may be off.

    Args:
        before: those rows of the base. rows: which they are.
        swapped: whether they are inputs of the layer.
    """
    wanted, size, rank = before.clone(), before.abs(), 0
    for side in sides:
        left, right = side.factors(rows, expert=expert, swapped=swapped)
        wanted += side.scaling * (left @ right)
        size = size + abs(side.scaling) * (left.abs() @ right.abs())
        rank += side.target.rank
    error = (rank + 4) * torch.finfo(torch.float32).eps * size
    magnitude = sides[0].pair.magnitude
    if magnitude is not None:
        columns = (magnitude[rows].double() / wanted.norm(dim=1)).unsqueeze(1)
        # A DoRA's norm is taken of factors rounded to the base's dtype, as they are when the adapter is used.
        error = columns.abs() * (error + _DORA_TOLERANCE * wanted.abs())
        wanted = columns * wanted
    return wanted, error
