"""An adapter built from updates: its config, its tensors, and the record of where it comes from."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.peft_keys import PREFIX, lora_weight_keys
from lora_kit.adapter.use_record import find_common_use
from lora_kit.algebra.low_rank import LowRankUpdate, compute_distance, compute_relative_error
from lora_kit.algebra.sources import Fingerprint, SourceAdapter
from lora_kit.config.lora_config import LoraConfig
from lora_kit.config.module_patterns import is_plain_name

UpdatesByPath = Mapping[str, tuple[str, LowRankUpdate]]
"""Kind of layer, and its update, by path."""

PROVENANCE: Final = "made"
"""The field of `lora_kit.json` that says how an adapter was made."""


@dataclass
class ErrorTally:
    """`‖actual - exact‖ / ‖exact‖` in Frobenius norms, of all layers together and where it is largest.

    `actual` is the float32 update that is saved.

    Attributes:
        distance: `‖actual - exact‖²`, summed over the layers.
        norm: `‖exact‖²`, summed over the layers.
        worst: the largest share of one layer.
        path: of that layer.
    """

    distance: float = 0.0
    norm: float = 0.0
    worst: float = 0.0
    path: str = ""

    def add(self, path: str, distance: float, norm: float) -> None:
        """Add a layer: `‖actual - exact‖` and `‖exact‖`."""
        self.distance += distance**2
        self.norm += norm**2
        share = compute_relative_error(distance, norm)
        if share > self.worst:
            self.worst, self.path = share, path

    def compare(self, path: str, actual: LowRankUpdate, exact: LowRankUpdate) -> None:
        """Add a layer by its two updates."""
        self.add(path, compute_distance(actual.round_to_float32(), exact), exact.norm())

    @property
    def share(self) -> float:
        return compute_relative_error(self.distance**0.5, self.norm**0.5)

    def to_json(self) -> dict[str, object]:
        return {"share": self.share, "worst": self.worst, "worst_layer": self.path}


def assemble_adapter(
    config: LoraConfig, updates: UpdatesByPath, saved: Mapping[str, Tensor], *, record: Mapping[str, object]
) -> Adapter:
    """Return the adapter of these updates: every scaling 1, LoRA weights in float32.

    Args:
        config: covers what the updates cover; its ranks and alphas are replaced.
        saved: tensors of `modules_to_save`, by path.
        record: its `lora_kit.json`.
    """
    tensors = {f"{PREFIX}{key}": tensor.clone() for key, tensor in saved.items()}
    for path, (kind, update) in updates.items():
        key_a, key_b = lora_weight_keys(path, kind)
        tensors[key_a], tensors[key_b] = update.a.float().contiguous(), update.b.float().contiguous()
    ranks = {path: update.rank for path, (_, update) in updates.items()}
    return Adapter(apply_ranks(config, ranks), tensors, record=record)


def apply_ranks(config: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """Return a config with these ranks by path, and alphas that make every scaling 1."""
    counts = Counter(ranks.values())
    usual = max(counts, key=lambda rank: (counts[rank], rank)) if ranks else config.r
    # The first match wins, and a path may be the end of another one: longer ones come first.
    deep_first = sorted(ranks, key=lambda path: (-path.count("."), path))
    patterns = {path: _escape_path(path) for path in deep_first if ranks[path] != usual}
    table = {pattern: ranks[path] for path, pattern in patterns.items()}
    config = dataclasses.replace(config, r=usual, lora_alpha=usual, use_rslora=False)
    ranked = dataclasses.replace(config, rank_pattern=table, alpha_pattern=table)
    # A path with the usual rank that ends like one with another rank has to be named, too.
    hidden = {path for path in deep_first if ranked.rank_of(path) != ranks[path]}
    if hidden:
        table = {_escape_path(path): ranks[path] for path in deep_first if path in patterns or path in hidden}
        ranked = dataclasses.replace(config, rank_pattern=table, alpha_pattern=table)
    return ranked


def _escape_path(path: str) -> str:
    return path if is_plain_name(path) else re.escape(path)


def build_target_fields(configs: Sequence[LoraConfig], paths: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a config that covers what these configs cover together.

    Args:
        configs: of the sources.
        paths: all layers they cover, listed where nothing shorter means the same in every model.
    """
    names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    targeting = [tuple(getattr(config, name) for name in names) for config in configs if config.target_modules]
    if not targeting:
        return {"target_modules": ()}
    if all(other == targeting[0] for other in targeting):
        return dict(zip(names, targeting[0], strict=True))
    if all(isinstance(targets, tuple) and not any(others) for targets, *others in targeting):
        # Names alone cover every layer they match, so the names of all cover the union.
        return {"target_modules": tuple(sorted({name for targets, *_ in targeting for name in targets}))}
    return {"target_modules": tuple(sorted(paths))}


def build_record(
    sources: Sequence[SourceAdapter], base: Fingerprint | None, provenance: Mapping[str, object]
) -> dict[str, object]:
    """Return the record of an adapter made of others: its base, prompt format, labels and provenance.

    Metrics of the sources are left out: they are not true of the result.
    """
    record: dict[str, object] = {PROVENANCE: dict(provenance)}
    if base is not None:
        record["base"] = dict(base)
    return record | find_common_use([source.adapter.record for source in sources])
