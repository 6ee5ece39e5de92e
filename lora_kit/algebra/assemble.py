"""An adapter made of updates: its config, its tensors, and what its record says of how it came to be."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.peft_keys import PREFIX, lora_weight_keys
from lora_kit.algebra.low_rank import LowRankUpdate, compute_distance, compute_relative_error
from lora_kit.algebra.sources import SourceAdapter
from lora_kit.config.lora_config import LoraConfig
from lora_kit.config.module_patterns import is_plain_name

logger = logging.getLogger(__name__)

UpdatesByPath = Mapping[str, tuple[str, LowRankUpdate]]
"""Kind of layer and update, by path."""

PROVENANCE: Final = "made"
"""In `lora_kit.json`: how an adapter was made of others."""


@dataclass
class ErrorTally:
    """How far made updates are from those that were meant, as a share: in all, and where it is largest.

    ‖made - meant‖ / ‖meant‖ in Frobenius norms, made being the float32 that is kept.
    """

    missed: float = 0.0
    meant: float = 0.0
    worst: float = 0.0
    path: str = ""

    def add(self, path: str, missed: float, meant: float) -> None:
        self.missed += missed**2
        self.meant += meant**2
        share = compute_relative_error(missed, meant)
        if share > self.worst:
            self.worst, self.path = share, path

    def compare(self, path: str, made: LowRankUpdate, meant: LowRankUpdate) -> None:
        self.add(path, compute_distance(made.round_to_float32(), meant), meant.norm())

    @property
    def share(self) -> float:
        return compute_relative_error(self.missed**0.5, self.meant**0.5)

    def to_json(self) -> dict[str, Any]:
        return {"share": self.share, "worst": self.worst, "worst_layer": self.path}


def assemble_adapter(
    config: LoraConfig, updates: UpdatesByPath, saved: Mapping[str, Tensor], *, record: Mapping[str, Any]
) -> Adapter:
    """The adapter of these updates, every scaling 1, pairs in float32.

    Args:
        config: whose ranks and alphas are replaced; it must cover what the updates cover.
        saved: tensors of modules saved whole, by path.
    """
    tensors = {f"{PREFIX}{key}": tensor.clone() for key, tensor in saved.items()}
    for path, (kind, factors) in updates.items():
        key_a, key_b = lora_weight_keys(path, kind)
        tensors[key_a], tensors[key_b] = factors.a.float().contiguous(), factors.b.float().contiguous()
    ranks = {path: factors.rank for path, (_, factors) in updates.items()}
    return Adapter(apply_ranks(config, ranks), tensors, record=record)


def apply_ranks(config: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """A config with these ranks by path, and alphas that make every scaling 1."""
    usual = max(Counter(ranks.values()).items(), key=lambda found: (found[1], found[0]))[0] if ranks else config.r
    # The first match wins, and a path may be the end of another one: longer ones come first.
    deep_first = sorted(ranks, key=lambda path: (-path.count("."), path))
    patterns = {path: _escape_path(path) for path in deep_first if ranks[path] != usual}
    table = {pattern: ranks[path] for path, pattern in patterns.items()}
    fields = _copy_config_fields(config) | {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": table,
        "alpha_pattern": table,
    }
    found = LoraConfig(**fields, use_rslora=False)
    # A path with the usual rank that ends like one with another rank has to be named, too.
    hidden = {path for path in deep_first if found.rank_of(path) != ranks[path]}
    if hidden:
        table = {_escape_path(path): ranks[path] for path in deep_first if path in patterns or path in hidden}
        found = LoraConfig(**{**fields, "rank_pattern": table, "alpha_pattern": table}, use_rslora=False)
    return found


def _copy_config_fields(config: LoraConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "use_rslora"}


def _escape_path(path: str) -> str:
    return path if is_plain_name(path) else re.escape(path)


def build_target_fields(configs: Sequence[LoraConfig], paths: Sequence[str]) -> dict[str, Any]:
    """The fields of a config that cover what these configs cover together.

    Args:
        paths: all layers they cover. They are listed where no shorter way says the same in every model.
    """
    names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    asked = [tuple(getattr(config, name) for name in names) for config in configs if config.target_modules]
    if not asked:
        return {"target_modules": ()}
    if all(other == asked[0] for other in asked):
        return dict(zip(names, asked[0], strict=True))
    if all(isinstance(targets, tuple) and not any(others) for targets, *others in asked):
        # Names alone cover every layer they match, so that together they cover the union.
        return {"target_modules": tuple(sorted({name for targets, *_ in asked for name in targets}))}
    return {"target_modules": tuple(sorted(paths))}


def build_record(
    parents: Sequence[SourceAdapter], base: Mapping[str, Any] | None, made: Mapping[str, Any]
) -> dict[str, Any]:
    """What is known of an adapter made of others: its base, how prompts are put, labels; and how it was made.

    What was measured of the parents is not true of it, and is left out.
    """
    record: dict[str, Any] = {PROVENANCE: dict(made)}
    if base is not None:
        record["base"] = dict(base)
    for name, values in (
        ("recipe", [_extract_prompt_fields(parent.adapter.record) for parent in parents]),
        ("labels", [parent.adapter.record.get("labels") for parent in parents]),
    ):
        known = [value for value in values if value]
        if known and all(value == known[0] for value in known):
            record[name] = known[0]
        elif known:
            logger.warning("the adapters were trained with different %s: none is carried over", _RECORD_WORDS[name])
    return record


_RECORD_WORDS: Final = {"recipe": "prompts (recipe.data.separator or chat_template)", "labels": "labels"}


def _extract_prompt_fields(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The part of a recipe that says how prompts are put."""
    recipe = record.get("recipe")
    data = recipe.get("data") if isinstance(recipe, Mapping) else None
    if not isinstance(data, Mapping):
        return None
    found = {name: data[name] for name in ("separator", "chat_template") if data.get(name) is not None}
    return {"data": found} if found else None
