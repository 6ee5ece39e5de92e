"""A base with a head for the labels of some adapters."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping

from lora_kit.adapter.adapter import Adapter
from lora_kit.evaluation.adapter_format import find_adapter_labels
from lora_kit.generation.adapter_args import check_quantize
from lora_kit.models.checkpoint_head import find_label_order
from lora_kit.models.heads import reason_figures_of_no_use
from lora_kit.models.loading import Base, load_base
from lora_kit.models.silence import use_log_level
from lora_kit.models.tasks import LABEL_TASKS
from lora_kit.targets.match import HEAD_NAMES

logger = logging.getLogger(__name__)


def load_for_labels(
    base: str | Base,
    adapters: Mapping[str, Adapter | None],
    task: str,
    quantize: str | None,
    *,
    problem: str | None = None,
) -> Base:
    """Return a loaded base, or load one with a head for the labels of the adapters."""
    check_quantize(base, list(adapters), list(adapters.values()), quantize)
    if isinstance(base, Base):
        return base
    labels: tuple[str, ...] = ()
    if task in LABEL_TASKS:
        recorded = [find_adapter_labels(adapter) for adapter in adapters.values() if adapter is not None]
        labels = next(filter(None, recorded), ())
        head, ordered = find_label_order(base, labels, task=task)
        reason = reason_figures_of_no_use(head, labels) if None in adapters.values() and labels else None
        if reason is not None:
            logger.warning("%s: its own figures say little: %s", base, reason)
        # A base whose own head has the adapters' labels is measured with that head, in its own order.
        labels = ordered if len(ordered) == len(labels) else labels
    label2id = {name: number for number, name in enumerate(labels)}
    # That the checkpoint has no head is of interest only where that head answers.
    is_brought = all(map(_has_head, adapters.values()))
    with use_log_level("lora_kit.models.heads", logging.WARNING) if is_brought else contextlib.nullcontext():
        return load_base(base, task=task, label2id=label2id or None, problem=problem, quantize=quantize)


def _has_head(adapter: Adapter | None) -> bool:
    """Return whether an adapter brings the weights of its head, as those that were trained for labels do."""
    return adapter is not None and any(path.split(".")[0] in HEAD_NAMES for path in adapter.saved())
