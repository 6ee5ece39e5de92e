"""Some rows of every folded weight, read back and compared with base + scaling · B A, computed again in fp64.

The computation starts from the adapter's own tensors in PEFT's layout, by state dict key. It uses nothing of the plan,
the fold or the writing.
"""

from __future__ import annotations

import math
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
from lora_kit.targets.coverage import survey_adapter
from lora_kit.targets.layer_target import LayerTarget

COMPARED_ROWS: Final = 16
"""Rows of a tensor that are compared, evenly spaced."""
_ROWS_PER_EXPERT: Final = 4
"""Rows of each expert that are compared."""


@dataclass(frozen=True)
class ExpectedUpdate:
    """What one adapter adds to one weight.

    Attributes:
        target: the layer.
        weights: A and B, as the adapter has them.
        scaling: with the weight of the adapter in it.
    """

    target: LayerTarget
    weights: LoraWeights
    scaling: float

    @property
    def key(self) -> str:
        """State dict key of the weight."""
        return self.target.path if self.target.kind == "parameter" else f"{self.target.path}.weight"

    def factors(
        self, rows: Tensor, *, expert: int, swapped: bool, rounded_to: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor]:
        """Return (n, r) and (r, m), fp64, whose product times the scaling is added to some rows.

        Args:
            rows: (n,) indices of rows of the weight.
            expert: index of the matrix.
            swapped: whether rows of the weight are inputs of the layer.
            rounded_to: dtype that A and B are rounded to.
        """
        a, b = (factor.to(rounded_to).double() for factor in (self.weights.a, self.weights.b))
        rank = self.target.rank
        if self.weights.kind == "convolution":
            a, b = a.flatten(1), b.flatten(1)
        if self.weights.kind == "parameter":
            a = a.view(self.target.experts, rank, -1)[expert]
            b = b.view(len(b), rank, self.target.experts)[:, :, expert]
        return (a[:, rows].T, b.T) if swapped else (b[rows], a)


def collect_expected_updates(model: nn.Module, adapters: Sequence[WeightedAdapter]) -> dict[str, list[ExpectedUpdate]]:
    """Return what adapters add to the weights of a model, by state dict key."""
    updates: dict[str, list[ExpectedUpdate]] = {}
    for weighted in adapters:
        weights = weighted.adapter.all_pairs()
        for target in survey_adapter(model, weighted.adapter).targets:
            update = ExpectedUpdate(target, weights[target.key], target.scaling * weighted.weight)
            updates.setdefault(update.key, []).append(update)
    return updates


def check_folded_weight(
    key: str,
    base: MetaModel,
    merged: MetaModel,
    updates: Sequence[ExpectedUpdate],
    packed: Mapping[str, QuantizedWeight],
    packed_now: Mapping[str, QuantizedWeight],
) -> int:
    """Check that some rows of a weight are base + adapters.

    Args:
        key: of the weight in the state dict.
        base: the base.
        merged: the result, as it was read back.
        updates: what the adapters add.
        packed: quantized weights of the base, by key.
        packed_now: quantized weights of the result, by key.

    Returns:
        How many values were compared.

    Raises:
        VerificationError: they are not.
    """
    module = base.model.get_submodule(key.rpartition(".")[0])
    own, written = base.values[key], merged.values[key]
    kind, magnitude = updates[0].weights.kind, updates[0].weights.magnitude
    if kind == "parameter" and own.ndim == 3:
        rows, swapped = pick_rows(own.shape[1], _ROWS_PER_EXPERT), is_transposed(module)
        return sum(
            _check_rows(f"{key}[{e}]", own[e], written[e], rows, updates, e, swapped=swapped) for e in range(len(own))
        )
    requantized = packed_now.get(key)
    if requantized is None and key not in packed:
        swapped = kind != "parameter" and is_stored_transposed(module)
        if swapped and magnitude is not None:  # a magnitude belongs to an output
            own, written, swapped = own.T, written.T, False
        own, written = own.flatten(1), written.flatten(1)
        return _check_rows(key, own, written, pick_rows(len(own)), updates, 0, swapped=swapped)
    rows = pick_whole_blocks(requantized, COMPARED_ROWS) if requantized else pick_rows(len(own))
    before = dequantize_rows(packed[key], rows) if key in packed else own[rows]
    expected, bound = _compute_expected_rows(before.double(), rows, updates, 0, swapped=False)
    if requantized:
        exact = {} if magnitude is None else {"exact": 0.0}
        check_quantized(requantized, rows, expected, **exact)
    else:
        _check_close(key, written[rows], expected, bound)
    return expected.numel()


def check_fused_weight(
    key: str,
    base: MetaModel,
    merged: MetaModel,
    updates: Sequence[ExpectedUpdate],
    own: Mapping[str, Tensor],
    written: Mapping[str, Tensor],
) -> int:
    """Check a parameter that the files hold as several tensors, as `check_folded_weight` checks the others.

    Args:
        key: of the parameter in the state dict.
        base: the base.
        merged: the result, as it was read back.
        updates: what the adapters add.
        own: the base's tensors, by name.
        written: the tensors of the result, by name.
    """
    compared = 0
    pieces = merged.find_pieces(key)
    if pieces is None or pieces != base.find_pieces(key):
        raise VerificationError(f"{key} was written in another form than the base's")
    for name, expert, begin, _ in pieces:
        rows = pick_rows(len(own[name]), _ROWS_PER_EXPERT)
        expected, bound = _compute_expected_rows(own[name][rows].double(), rows + begin, updates, expert, swapped=False)
        _check_close(name, written[name][rows], expected, bound)
        compared += expected.numel()
    return compared


def _check_rows(
    name: str,
    own: Tensor,
    written: Tensor,
    rows: Tensor,
    updates: Sequence[ExpectedUpdate],
    expert: int,
    *,
    swapped: bool,
) -> int:
    dtype = torch.promote_types(own.dtype, written.dtype)
    expected, bound = _compute_expected_rows(
        own[rows].double(), rows, updates, expert, swapped=swapped, norm_dtype=dtype
    )
    _check_close(name, written[rows], expected, bound)
    return expected.numel()


def pick_rows(count: int, most: int = COMPARED_ROWS) -> Tensor:
    """Return at most so many evenly spaced row indices of a tensor with `count` rows."""
    return torch.linspace(0, count - 1, min(most, count), dtype=torch.float64).long()


def _check_close(name: str, written: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Raise VerificationError where values differ by more than the bound and rounding to their dtype allow."""
    info = torch.finfo(written.dtype)
    bound = bound + info.eps / 2 * 1.01 * expected.abs() + info.tiny
    off = (written.double() - expected).abs()
    if not (off - bound).max() <= 0:
        raise VerificationError(
            f"{name.removesuffix('.weight')}: what was written is up to {float(off.max()):.3g} away from base + "
            f"adapter; rounding allows at most {float(bound.max()):.3g}"
        )


def _compute_expected_rows(
    before: Tensor,
    rows: Tensor,
    updates: Sequence[ExpectedUpdate],
    expert: int,
    *,
    swapped: bool,
    norm_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Return some rows of base + adapters in fp64, and the largest error of the same sum in fp32.

    Args:
        before: (n, m) fp64, these rows of the base.
        rows: (n,) their indices.
        updates: what the adapters add.
        expert: index of the matrix.
        swapped: whether the rows are inputs of the layer.
        norm_dtype: that A and B are rounded to for the norm of a DoRA: the finer one of base and result.
    """
    expected, size, rank = before.clone(), before.abs(), 0
    for update in updates:
        left, right = update.factors(rows, expert=expert, swapped=swapped)
        expected += update.scaling * (left @ right)
        size = size + abs(update.scaling) * (left.abs() @ right.abs())
        rank += update.target.rank
    error = (rank + 4) * torch.finfo(torch.float32).eps * size
    magnitude = updates[0].weights.magnitude
    if magnitude is not None:
        left, right = updates[0].factors(rows, expert=expert, swapped=swapped, rounded_to=norm_dtype)
        norm = (before + updates[0].scaling * (left @ right)).norm(dim=1, keepdim=True)
        columns = magnitude[rows].double().unsqueeze(1) / norm
        # The errors of a sum of m squares in fp32 grow with the root of m, and where its terms cancel.
        steps = rank + 4 + math.sqrt(before.shape[1])
        norm_error = steps * torch.finfo(torch.float32).eps * (size.norm(dim=1, keepdim=True) / norm) ** 2
        error = columns.abs() * (error + norm_error * expected.abs())
        expected = columns * expected
    return expected, error
