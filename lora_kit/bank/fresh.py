"""What a trainable adapter begins with: pairs whose product is zero, the base's own modules and rows."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kit.bank.places import WrappedLayers
from lora_kit.bank.residents import Resident, Residents
from lora_kit.config import LoraConfig
from lora_kit.layers import INDICES, MAGNITUDE, ROWS, A, B, LoraLinear, Starts, TokenTable, initialise
from lora_kit.ops import dora_scale
from lora_kit.targets import Target


def begin(resident: Resident, residents: Residents, layers: WrappedLayers) -> None:
    """Fill a resident's slot with what leaves the base's outputs as they are, and make it trainable."""
    config, coverage = resident.config, resident.coverage
    starts = Starts(config.init_lora_weights, len(coverage.targets))
    for target in coverage.targets:
        residents.put(resident, target.path, _pair(target, config, starts, layers), target.scaling)
    for path in coverage.saved:
        residents.put(resident, path, layers[path].base_layer.state_dict(), 1.0)
    for rows in coverage.tokens:
        table = layers[rows.key]
        assert isinstance(table, TokenTable)
        indices = torch.tensor(rows.indices, device=table.device)
        residents.put(resident, rows.key, {ROWS: table.own_rows(indices), INDICES: indices}, 1.0)
    for path in resident.layers:
        resident.leaves += layers[path].make_trainable(resident.slot, config.lora_dropout)


def _pair(target: Target, config: LoraConfig, starts: Starts, layers: WrappedLayers) -> dict[str, Tensor]:
    layer = layers[target.path]
    a, b = (torch.zeros(shape, device=layer.device) for shape in target.shapes)
    if target.started:
        return {A: a, B: b} | starts.of(target.path, layer.base_layer, rank=target.rank, scaling=target.scaling)
    initialise(a, b, kind=target.kind, init=config.init_lora_weights)
    if not target.dora:
        return {A: a, B: b}
    assert isinstance(layer, LoraLinear)
    ones = torch.ones(target.out_features, device=layer.device)
    # The lengths a DoRA starts from, which leave the weight as it is.
    return {A: a, B: b, MAGNITUDE: 1 / dora_scale(layer.weight_matrix(), a, b, target.scaling, ones)}
