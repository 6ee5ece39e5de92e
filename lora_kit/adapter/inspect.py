"""What one adapter is made of, seen without a base model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.conversion.convert import read_foreign_adapter as read_foreign
from lora_kit.adapter.folder import RECORD
from lora_kit.adapter.peft_keys import LoraWeights
from lora_kit.adapter.store import _natural_sort_key, find_adapter, sum_file_sizes, to_json_value
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import AdapterError, ConfigError, LoraKitError
from lora_kit.names import DEFAULT_STORE


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """What an adapter does to one module: `delta = scaling · B A`.

    Attributes:
        path: the module's path in the base.
        kind: `linear` or `embedding`.
        shape: (out, in) of the delta; (dim, entries) for an embedding.
        rank: rows of A.
        scaling: what `B A` is multiplied by.
        norm: Frobenius norm of the delta.
        values: its singular values, falling, one for each rank; of a DoRA, before its rows are rescaled.
    """

    path: str
    kind: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    norm: float
    values: tuple[float, ...]

    @property
    def effective_rank(self) -> float:
        """`exp(-Σ p log p)` of `p = values / Σ values` (Roy, Vetterli 2007): how many directions the delta has.

        1 where one is all of it, the rank where all weigh the same, 0 for a delta of zero.
        """
        total = math.fsum(self.values)
        shares = [value / total for value in self.values if value > 0]
        return math.exp(-math.fsum(share * math.log(share) for share in shares)) if shares else 0.0

    def ranks_for(self, energy: float) -> int:
        """The fewest ranks that hold this share of `‖delta‖²`; at least 1."""
        squares = [value**2 for value in self.values]
        wanted, held = energy * math.fsum(squares), 0.0
        for rank, square in enumerate(squares, 1):
            held += square
            if held >= wanted:
                return rank
        return len(squares)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What one adapter is made of.

    Attributes:
        name, folder: the folder it was read from.
        config: PEFT's fields.
        layers: one entry per low-rank pair.
        saved: shapes of the modules saved whole, by key.
        parameters: number of values it holds.
        bytes: size of the folder's files.
        digest: its identity.
        base: fingerprint of the base it was made for; None where it says nothing.
        record: what its `lora_kit.json` carries.
        notes: what had to be done to read it, and what its files do not say, where another tool wrote it in its way.
        tokens: which tokens it has rows of, by path of the embedding or head.
    """

    name: str
    folder: Path
    config: LoraConfig
    layers: tuple[LayerSummary, ...]
    saved: Mapping[str, tuple[int, ...]]
    parameters: int
    bytes: int
    digest: str
    base: Mapping[str, Any] | None
    record: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def norm(self) -> float:
        """Frobenius norm of all deltas together."""
        return math.sqrt(sum(layer.norm**2 for layer in self.layers))

    def to_json(self) -> dict[str, Any]:
        return {**to_json_value(self), "config": self.config.to_dict(), "norm": self.norm}


def inspect(adapter: str | Path, *, store: str | Path = DEFAULT_STORE) -> Inspection:
    """What an adapter is made of; it is read strictly, as loading it would.

    What another tool wrote in a way that is not loaded as it is, is explained as `lora_kit.adapter.conversion`
    reads it.

    Args:
        adapter: a folder, the name of one in `store`, or a weight file of another tool.
        store: where names are looked up.

    Raises:
        UnknownAdapterError: no such folder and no such name.
        AdapterError, ConfigError: it cannot be read.
    """
    folder = Path(adapter) if Path(adapter).is_file() else find_adapter(adapter, store=store)
    value, notes = _load_or_convert(folder)
    return Inspection(
        name=folder.resolve().name,
        folder=folder,
        config=value.config,
        layers=summarize_layers(value),
        saved={key: tuple(tensor.shape) for key, tensor in value.saved().items()},
        parameters=value.num_parameters,
        bytes=folder.stat().st_size if folder.is_file() else sum_file_sizes(folder),
        digest=value.digest,
        base=value.base if isinstance(value.base, Mapping) else None,
        record=value.record,
        notes=notes,
        tokens={path: held.indices for path, held in value.tokens().items()},
    )


def _load_or_convert(path: Path) -> tuple[Adapter, tuple[str, ...]]:
    """An adapter, and how another tool wrote it where it cannot be loaded as it is."""
    try:
        return Adapter.load(path), ()
    except (AdapterError, ConfigError) as error:
        if (path / RECORD).exists():
            raise  # of ours: that something is wrong with it is not to be explained away
        refusal = error if path.is_dir() else AdapterError(f"{path} is no adapter")
    try:
        found = read_foreign(path)
    except LoraKitError:
        raise refusal from None
    told = (f"written by {found.layout}: `lora-kit convert` makes an adapter of ours of it", *found.notes)
    return found.adapter, (*told, *(f"not said: {what}; shown as if scaling were 1" for what in found.open))


def summarize_layers(adapter: Adapter) -> tuple[LayerSummary, ...]:
    """One summary per low-rank pair, by path, numbers in it as numbers."""
    pairs = sorted(adapter.all_pairs().items(), key=lambda item: _natural_sort_key(item[0]))
    return tuple(_summarize_layer(path, pair, adapter.config) for path, pair in pairs)


def compute_singular_values(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Those of `B A` in rank space: with `B = Q_b R_b` and `Aᵀ = Q_a R_a` they are the ones of `R_b R_aᵀ`.

    Shapes: b (out, r), a (r, in), of any floating dtype; float64 (min(r, out, in),), falling. The product is never
    formed, and nothing is squared.
    """
    b, a = b.detach().double(), a.detach().double()
    return torch.linalg.svdvals(torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T)


def _summarize_layer(path: str, pair: LoraWeights, config: LoraConfig) -> LayerSummary:
    scaling = config.scaling_of(path)
    by_expert = [compute_singular_values(b, a) for a, b in pair.split_by_expert(config.rank_of(path))]
    values = abs(scaling) * torch.cat(by_expert).sort(descending=True).values
    return LayerSummary(
        path=path,
        kind=pair.kind,
        shape=(pair.b.shape[0], pair.a.shape[1]),
        rank=pair.a.shape[0],
        scaling=scaling,
        norm=float(values.norm()),
        values=tuple(values.tolist()),
    )
