"""Heads of adapters with different numbers of labels, in one batch: all as wide as the widest, the rest is cut off."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_record import RECORD
from lora_kit.adapter.peft_keys import PREFIX, lora_weight_keys
from lora_kit.adapter.use_record import find_recorded_data
from lora_kit.data.sample_format import DEFAULT_MAX_LENGTH
from lora_kit.errors import AdapterError, LoraKitError
from lora_kit.evaluation.adapter_format import find_adapter_labels, find_adapter_problem, find_thresholds
from lora_kit.evaluation.forward import choose_classes, compute_scores
from lora_kit.evaluation.prediction import Prediction
from lora_kit.io.read import read_json
from lora_kit.models.checkpoint_head import read_base_config
from lora_kit.models.heads import (
    find_label_layer,
    list_checkpoint_labels,
    list_head_labels,
    pad_rows,
    widen_label_layer,
)
from lora_kit.models.loading import Base
from lora_kit.models.locate import locate_base
from lora_kit.models.tasks import CLASSIFY, PROBLEM_KINDS, SINGLE_LABEL, VALUE

_KEPT: Final = 256
_RECORD_BYTES: Final = 2**22


@dataclass(frozen=True)
class LabelHead:
    """What one head predicts.

    Attributes:
        labels: in the order of its classes.
        problem: one of `PROBLEMS`.
        thresholds: of each label of a set; empty for 0.5.
        max_length: tokens of a text, at most; longer texts lose their end, as in training.
    """

    labels: tuple[str, ...]
    problem: str
    thresholds: tuple[float, ...]
    max_length: int

    def predict(self, scores: Iterable[float], *, is_cut: bool) -> Prediction:
        """Return what the scores of a text mean; those beyond the labels are of wider heads.

        Args:
            scores: before any softmax.
            is_cut: whether the text lost its end.
        """
        kind, row = PROBLEM_KINDS[self.problem], torch.tensor([list(scores)[: len(self.labels)]])
        values = compute_scores(row, kind)
        if kind == VALUE:
            return Prediction(value=float(values[0, 0]), cut=is_cut)
        chosen = choose_classes(values, kind, self.thresholds)[0]
        probabilities = dict(zip(self.labels, values[0].tolist(), strict=True))
        return Prediction(labels=tuple(self.labels[n] for n in chosen), probabilities=probabilities, cut=is_cut)


class LabelHeads:
    """The heads that a classifier serves: the base's own, and those of adapters.

    Attributes:
        base: of task `classify`.
        width: labels of an adapter, at most.
    """

    def __init__(self, base: Base, *, width: int) -> None:
        """Widen the base's head; do it before a bank is attached.

        Args:
            base: of task `classify`.
            width: labels of an adapter, at most; the base's own if it has more.
        """
        self.base = base
        self._path, layer = find_label_layer(base.model, CLASSIFY)
        self._own_width = layer.out_features
        self._has_own = bool(list_checkpoint_labels(read_base_config(locate_base(base.name)), CLASSIFY))
        self.width = max(width, self._own_width)
        widen_label_layer(layer, self.width)
        self._fitted = OrderedDict[str, Adapter]()  # by digest, the least recently used first

    def fit(self, adapter: Adapter) -> Adapter:
        """Return an adapter whose head is as wide as that of the base.

        Raises:
            AdapterError: it has more labels, or a DoRA of the layer that predicts them.
        """
        if adapter.digest not in self._fitted:
            self._fitted[adapter.digest] = self._widen(adapter)
            if len(self._fitted) > _KEPT:
                self._fitted.popitem(last=False)
        self._fitted.move_to_end(adapter.digest)
        return self._fitted[adapter.digest]

    def describe(self, adapter: Adapter | None) -> LabelHead:
        """Return what the head of an adapter predicts, or the base's own with None.

        Raises:
            AdapterError: the base has no head of its own, or the adapter's record does not match its head.
        """
        if adapter is None and not self._has_own:
            raise AdapterError(f"{self.base.name} has no head of its own", hint="ask one of its adapters")
        width = self._own_width if adapter is None else self._count_labels(adapter)
        recorded = () if adapter is None else find_adapter_labels(adapter)
        own = list_head_labels(self.base.model.config)
        labels = recorded or (own if len(own) == width else tuple(f"LABEL_{number}" for number in range(width)))
        if len(labels) != width:
            raise AdapterError(f"the adapter's record has {len(labels)} labels, its head {width}")
        record = (self.base if adapter is None else adapter).record
        length = (find_recorded_data(record) or {}).get("max_length")
        return LabelHead(
            labels,
            (find_adapter_problem(adapter) if adapter is not None else None) or self.base.problem or SINGLE_LABEL,
            find_thresholds(record, labels),
            length if isinstance(length, int) and length > 1 else DEFAULT_MAX_LENGTH,
        )

    def _count_labels(self, adapter: Adapter) -> int:
        saved = adapter.saved().get(f"{self._path}.weight")
        return self._own_width if saved is None else len(saved)

    def _widen(self, adapter: Adapter) -> Adapter:
        count = self._count_labels(adapter)
        if count > self.width:
            message = f"the adapter has {count} labels; this server was started for {self.width} at most"
            raise AdapterError(message, hint=f"--labels {count}")
        if self.width == self._own_width == count:
            return adapter
        tensors = dict(adapter.tensors)
        for key in self._list_label_keys(adapter):
            tensors[key] = pad_rows(tensors[key], self.width)
        return Adapter(adapter.config, tensors, record=self._strip_record(adapter))

    def _list_label_keys(self, adapter: Adapter) -> list[str]:
        """Return the keys of tensors with a row for each label."""
        lora = adapter.all_pairs().get(self._path)
        if lora is not None and adapter.config.use_dora:
            raise AdapterError(f"{self._path} is a DoRA, whose head cannot be served beside wider ones")
        keys = [f"{PREFIX}{self._path}.{name}" for name in ("weight", "bias")]
        keys += [lora_weight_keys(self._path, lora.kind)[1]] if lora is not None else []
        return [key for key in keys if key in adapter.tensors]

    def _strip_record(self, adapter: Adapter) -> Mapping[str, Any]:
        """Return the record without what a wider head changes in the fingerprint of the base; the rest is compared."""
        if adapter.base is None:
            return adapter.record
        weights = adapter.base.get("weights")
        kept = {
            key: value
            for key, value in (weights.items() if isinstance(weights, Mapping) else ())
            if key.rpartition(".")[0] != self._path
        }
        base = {key: value for key, value in adapter.base.items() if key != "structure"}
        return {**adapter.record, "base": {**base, "weights": kept}}


def find_widest_head(folders: Iterable[Path]) -> int:
    """Return the largest number of labels that the records of adapters name; 0 where none does."""
    return max(map(_count_recorded_labels, folders), default=0)


def _count_recorded_labels(folder: Path) -> int:
    try:
        labels = read_json(folder / RECORD, limit=_RECORD_BYTES).get("labels")
    except LoraKitError:  # without a record, or damaged: a request for it says so
        return 0
    return len(labels) if isinstance(labels, list) else 0
