"""The plan of a training, as values: what it goes over, what it trains, what it takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit.train.recipe import Recipe

if TYPE_CHECKING:
    from lora_kit.train.footprint import Footprint


@dataclass(frozen=True)
class Kind:
    """Modules of one name: how many are trained, with how many parameters."""

    name: str
    modules: int
    parameters: int


@dataclass(frozen=True)
class Data:
    """Rows of the training file as samples.

    Attributes:
        rows: of the file. samples: that are trained on in an epoch.
        tokens: of all samples. labels: on which a loss is taken.
        cut: rows that lose tokens, or become several samples, to fit `longest`.
        longest: tokens of a sample at the most.
    """

    rows: int
    samples: int
    tokens: int
    labels: int
    cut: int
    longest: int


@dataclass(frozen=True)
class Steps:
    """How the training goes over the data.

    Attributes:
        steps: optimiser steps. warmup: of them with a rising learning rate. per_epoch: in one pass over the data.
        batch: samples of a step. micro_batch: samples at once. accumulation: micro-batches of a step.
    """

    steps: int
    warmup: int
    per_epoch: int
    batch: int
    micro_batch: int
    accumulation: int


@dataclass(frozen=True)
class Measured:
    """Two steps that were done to see, and undone: one of the longest samples there are, then one of any.

    Attributes:
        seconds: of the second step. tokens: in it.
        peak_bytes: the most memory in both: of the CUDA device, or of the whole process where there is none.
        micro_batch: rows at once: those of the recipe, or fewer where memory ran out.
    """

    seconds: float
    tokens: int
    peak_bytes: int
    micro_batch: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training would do.

    Attributes:
        out: where the result would be written. goes_on_from: step of the checkpoint it would begin at; 0 for anew.
        trainable, parameters: elements trained, and of the model with the adapter. kinds: where the trained ones are.
        memory: estimated, see `lora_kit.train.footprint`.
        measured: in two steps on this machine.
        seconds: estimated wall time of all steps, evaluations left out: all tokens at the speed of the measured step.
        recipe: as it was resolved.
    """

    out: Path
    goes_on_from: int
    trainable: int
    parameters: int
    kinds: tuple[Kind, ...]
    data: Data
    steps: Steps
    memory: Footprint
    measured: Measured
    seconds: float
    recipe: Recipe

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        fields = {name: value for name, value in vars(self).items() if name not in ("out", "recipe", "kinds")}
        plain = {name: asdict(value) if hasattr(value, "__dataclass_fields__") else value
                 for name, value in fields.items()}  # fmt: skip
        plain["memory"]["total"] = self.memory.total
        kinds = [asdict(kind) for kind in self.kinds]
        return {"out": str(self.out), **plain, "kinds": kinds, "recipe": self.recipe.to_dict()}
