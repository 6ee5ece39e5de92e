"""Whether a training computes its frozen layers once, and why not."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from torch import nn

from lora_kit.data.batches import Collator
from lora_kit.io.text import escape_text
from lora_kit.models.frozen_prefix import (
    PrefixStates,
    estimate_saved_share,
    find_frozen_prefix,
    reason_not_replaceable,
)
from lora_kit.training.prefix.prefix_cache import Facts, PrefixComputer, Samples, open_prefix_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

PrefixSetting: TypeAlias = str | float | bool
"""`auto`; the most gigabytes on disk; or False."""
AUTO: Final = "auto"
TRAIN: Final = "train"
VALIDATION: Final = "validation"
_AUTO_BYTES: Final = 16 * 10**9
_FREE_SHARE: Final = 0.5
"""Of the free space on the disk, what states take at most where the recipe does not say how much they may."""
_LEAST_SAVED: Final = 0.1
"""Share of a step below which frozen layers are computed again and again: reading their states costs time, too."""


@dataclass(frozen=True)
class PrefixChoice:
    """Whether the frozen layers of a training are computed once.

    Attributes:
        computer: of what they give; None where they are computed in every step.
        reason: in words, which layers, or why none.
    """

    computer: PrefixComputer | None
    reason: str

    def __str__(self) -> str:
        return f"computed {'in every step' if self.computer is None else 'once'}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class PrefixCache:
    """Where the states of frozen layers are kept, if they are.

    Attributes:
        folder: for the states.
        setting: of the recipe.
        facts: what decides the states besides the layers, as JSON values.
        on_batch: called after each batch that is computed; what it raises ends the work.
    """

    folder: Path
    setting: PrefixSetting
    facts: Facts
    on_batch: Callable[[], None]

    def choose(
        self,
        model: PreTrainedModel,
        frozen: Sequence[nn.Module],
        splits: Mapping[str, Samples],
        collator: Collator,
        *,
        passes: float,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> PrefixChoice:
        """Decide whether the frozen layers are computed once; nothing is written.

        Args:
            frozen: the modules whose outputs depend on nothing that is trained.
            splits: the samples, by the name of their file; those of `train` are trained on.
            passes: how often the training goes through its samples.
            autocast: enters the dtype that the training computes in.
        """
        if self.setting is False:
            return PrefixChoice(None, "the recipe says so")
        prefix = find_frozen_prefix(model, frozen)
        if prefix is None:
            return PrefixChoice(None, "no layer of the model is frozen below the trained ones")
        computer = PrefixComputer(
            model=model, prefix=prefix, collator=collator, autocast=autocast, on_batch=self.on_batch
        )
        reason = self._reason_not_worthwhile(computer, splits, passes) or _reason_probe_fails(computer, splits[TRAIN])
        if reason is not None:
            return PrefixChoice(None, reason)
        layers = f"{len(prefix.layers)} of {prefix.total} layers in {prefix.path}"
        return PrefixChoice(computer, f"{layers}, {_count_bytes(computer, splits) / 1e9:.2f} GB on disk")

    def open_states(self, choice: PrefixChoice, splits: Mapping[str, Samples]) -> dict[str, PrefixStates]:
        """Return what the frozen layers give for samples, by the name of their file; empty where it is not kept.

        Raises:
            StorageError: the states cannot be written.
        """
        if choice.computer is None:
            # A warning where the recipe asks for something else.
            level = logging.INFO if self.setting in (AUTO, True, False) else logging.WARNING
            logger.log(level, "frozen layers are %s", choice)
            return {}
        logger.info("frozen layers are %s, in %s", choice, escape_text(self.folder))
        return open_prefix_states(self.folder, splits, choice.computer, self.facts)

    def _reason_not_worthwhile(
        self, computer: PrefixComputer, splits: Mapping[str, Samples], passes: float
    ) -> str | None:
        needed = _count_bytes(computer, splits)
        if self.setting not in (AUTO, True):
            is_small = needed <= float(self.setting) * 1e9
            return None if is_small else f"their states take {needed / 1e9:.2f} GB, above train.prefix_cache"
        if passes < 2:
            return "no sample is trained on twice"
        share = estimate_saved_share(computer.model, computer.prefix)
        if share < _LEAST_SAVED:
            return f"they are {share:.0%} of a step"
        free = shutil.disk_usage(_find_existing(self.folder)).free
        if needed > min(_AUTO_BYTES, _FREE_SHARE * free):
            return f"their states take {needed / 1e9:.1f} GB on disk (train.prefix_cache: GB allows more)"
        return None


def _count_bytes(computer: PrefixComputer, splits: Mapping[str, Samples]) -> int:
    width = computer.model.config.get_text_config().hidden_size
    tokens = sum(int(samples.lengths.sum()) for samples in splits.values())
    return int(tokens * width * computer.model.dtype.itemsize)


def _reason_probe_fails(computer: PrefixComputer, samples: Samples) -> str | None:
    """Return why the model is not the same with states that were kept, tried on its shortest and longest sample."""
    lengths = samples.lengths
    indices = [int(lengths.argmin()), int(lengths.argmax())]
    with computer.autocast():
        return reason_not_replaceable(computer.model, computer.prefix, computer.make_inputs(samples, indices))


def _find_existing(folder: Path) -> Path:
    return next(path for path in folder.absolute().parents if path.exists())
