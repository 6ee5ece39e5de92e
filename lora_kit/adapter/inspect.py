"""Inspect one adapter without a base model: its layers, ranks and singular values.

An adapter of ours that is whole is read with numpy alone: importing torch would take most of the time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_kit.adapter.adapter_location import label_adapter_folder
from lora_kit.adapter.adapter_record import RECORD, find_changed_files
from lora_kit.adapter.folder import check_allowances
from lora_kit.adapter.plain_adapter import ContentToShow, FloatArray, WeightsToShow, read_plain_adapter
from lora_kit.adapter.store import find_adapter, sum_file_sizes, to_json_value
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import AdapterError, ConfigError, LoraKitError
from lora_kit.io.strict_json import JsonObject
from lora_kit.names import DEFAULT_STORE

if TYPE_CHECKING:
    from lora_kit.adapter.adapter import Adapter


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """The update of one module: `delta = scaling · B A`.

    Attributes:
        path: the module's path in the base.
        kind: of the layer, as in `LoraWeights`.
        shape: (out, in) of the delta; (dim, entries) for an embedding.
        rank: rows of A.
        scaling: factor of `B A`.
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
        """`exp(-Σ p log p)` of `p = values / Σ values` (Roy, Vetterli 2007): the number of directions of the delta.

        1 where there is one direction, the rank where all values are equal, 0 for a delta of zero.
        """
        total = math.fsum(self.values)
        shares = [value / total for value in self.values if value > 0]
        return math.exp(-math.fsum(share * math.log(share) for share in shares)) if shares else 0.0

    def ranks_for(self, energy: float) -> int:
        """Return the fewest ranks whose values make up this share of `‖delta‖²`; at least 1."""
        squares = [value**2 for value in self.values]
        wanted = energy * math.fsum(squares)
        sums = itertools.accumulate(squares)
        return next((rank for rank, reached in enumerate(sums, 1) if reached >= wanted), len(squares))


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The content of one adapter.

    Attributes:
        name: of the folder.
        folder: that it was read from.
        config: of the adapter.
        layers: one entry per layer with LoRA weights.
        saved: shapes of the tensors of `modules_to_save`, by key.
        parameters: number of values it holds.
        bytes: size of the folder's files.
        digest: its identity.
        base: fingerprint of the base it was made for; None where it is not known.
        record: content of its `lora_kit.json`.
        changed_files: files that are not as the record says, each with what happened to it; None without a record.
        notes: where another tool wrote it in its own format: how it was converted, and what its files do not say.
        tokens: the tokens that it has embeddings of, by path of the embedding or head.
    """

    name: str
    folder: Path
    config: LoraConfig
    layers: tuple[LayerSummary, ...]
    saved: Mapping[str, tuple[int, ...]]
    parameters: int
    bytes: int
    digest: str
    base: Mapping[str, object] | None
    record: Mapping[str, object]
    changed_files: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def norm(self) -> float:
        """Frobenius norm of all deltas together."""
        return math.sqrt(sum(layer.norm**2 for layer in self.layers))

    def to_json(self) -> JsonObject:
        """Return JSON values of every field, and the norm."""
        return {**to_json_value(self), "config": self.config.to_dict(), "norm": self.norm}


def inspect(adapter: str | Path, *, store: str | Path = DEFAULT_STORE, allow: Collection[str] = ()) -> Inspection:
    """Inspect an adapter; it is read as strictly as loading reads it.

    An adapter in the format of another tool is shown as `lora_kit.adapter.conversion` converts it.

    Args:
        adapter: a folder, the name of one in `store`, an id of the hub, or a weight file of another tool.
        store: where names are looked up.
        allow: as in `Adapter.load`.

    Raises:
        UnknownAdapterError: no such folder and no such name.
        AdapterError: its weights or its record cannot be read.
        ConfigError: its config cannot be read.
    """
    check_allowances(allow)
    folder = Path(adapter) if Path(adapter).is_file() else find_adapter(adapter, store=store)
    content, notes = read_plain_adapter(folder), tuple[str, ...]()
    if content is None:
        content, notes = _load_or_convert(folder, allow)
    record = content.record
    return Inspection(
        name=label_adapter_folder(folder),
        folder=folder,
        config=content.config,
        layers=_summarize_layers(content),
        saved=content.saved,
        parameters=content.parameters,
        bytes=folder.stat().st_size if folder.is_file() else sum_file_sizes(folder),
        digest=content.digest,
        base=record["base"] if isinstance(record.get("base"), Mapping) else None,
        record=record,
        changed_files=find_changed_files(folder, dict(record)) if "files" in record else None,
        notes=notes,
        tokens=content.tokens,
    )


def _load_or_convert(path: Path, allow: Collection[str]) -> tuple[ContentToShow, tuple[str, ...]]:
    """Load an adapter, or convert one of another tool; return notes on how it was converted too."""
    from lora_kit.adapter.adapter import Adapter
    from lora_kit.adapter.conversion.convert import read_foreign_adapter

    try:
        return _show(Adapter.load(path, allow=allow)), ()
    except (AdapterError, ConfigError) as error:
        if (path / RECORD).exists():
            raise  # one of ours, which is damaged
        load_error = error if path.is_dir() else AdapterError(f"{path} is not an adapter")
    try:
        foreign = read_foreign_adapter(path)
    except LoraKitError:
        raise load_error from None
    layout = f"written by {foreign.layout}: `lora-kit convert` makes an adapter of ours of it"
    missing = (f"its files do not give {what}; shown as if scaling were 1" for what in foreign.open)
    return _show(foreign.adapter), (layout, *foreign.notes, *missing)


def _show(adapter: Adapter) -> ContentToShow:
    """Return what is to be shown of an adapter that was loaded."""
    weights = {
        path: WeightsToShow(
            kind=each.kind,
            shape=(each.b.shape[0], each.a.shape[1]),
            rank=each.a.shape[0],
            factors=[
                (a.double().numpy(), b.double().numpy()) for a, b in each.split_by_expert(adapter.config.rank_of(path))
            ],
        )
        for path, each in adapter.all_pairs().items()
    }
    return ContentToShow(
        config=adapter.config,
        record=adapter.record,
        digest=adapter.digest,
        weights=weights,
        saved={key: tuple(tensor.shape) for key, tensor in adapter.saved().items()},
        parameters=adapter.num_parameters,
        tokens={path: embeddings.indices for path, embeddings in adapter.tokens().items()},
    )


def _summarize_layers(content: ContentToShow) -> tuple[LayerSummary, ...]:
    """Summarize each layer with LoRA weights, sorted by path; numbers in paths are compared as numbers."""
    weights = sorted(content.weights.items(), key=lambda item: _natural_sort_key(item[0]))
    return tuple(_summarize_layer(path, each, content.config.scaling_of(path)) for path, each in weights)


def _natural_sort_key(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]


def _compute_singular_values(b: FloatArray, a: FloatArray) -> FloatArray:
    """Return the singular values of `B A`: those of the core `R_b R_aᵀ` of `B = Q_b R_b` and `Aᵀ = Q_a R_a`.

    The product is never formed, and nothing is squared.

    Shapes: b (out, r), a (r, in); returns float64 (min(r, out, in),), falling.
    """
    b, a = b.astype(np.float64), a.astype(np.float64)
    r_b, r_a = (np.asarray(np.linalg.qr(factor, mode="r")) for factor in (b, a.T))
    return np.linalg.svd(r_b @ r_a.T, compute_uv=False)


def _summarize_layer(path: str, weights: WeightsToShow, scaling: float) -> LayerSummary:
    parts = [_compute_singular_values(b, a) for a, b in weights.factors]
    values = abs(scaling) * np.sort(np.concatenate(parts))[::-1]
    return LayerSummary(
        path=path,
        kind=weights.kind,
        shape=weights.shape,
        rank=weights.rank,
        scaling=scaling,
        norm=float(np.linalg.norm(values)),
        values=tuple(values.tolist()),
    )
