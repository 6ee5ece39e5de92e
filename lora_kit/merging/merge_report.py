"""The report of a merge: what was merged, how much of the deltas survived, and what was checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from lora_kit.adapter.model_card import format_table
from lora_kit.io.portable_paths import make_folder_portable
from lora_kit.layers.fold import Retention
from lora_kit.merging.writing.hashing_file import FileDigest
from lora_kit.models.model_folder_card import render_model_card

_WORST_SHOWN: Final = 10


@dataclass(frozen=True)
class LogitCheck:
    """The logits of base + adapter compared with those of the merged model, both in fp32 on the same tokens.

    Attributes:
        largest_difference: of a logit, absolute.
        bound: of that difference: a multiple of what noise as large as one rounding to the result's dtype changes.
        effect: the largest change of a logit by the adapter itself; a bound that is not far below it proves little.
    """

    largest_difference: float
    bound: float
    effect: float


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What was merged, and the results of the checks.

    Attributes:
        out: the folder that was written.
        base: as it was given.
        adapters: the weight of each, by digest.
        dtype: of the merged weights; the coarsest where they differ.
        counts: tensors that were `copied`, `cast`, `folded`, `replaced`, `added` and written `with new rows`.
        tensors: for each weight with a delta, its size and the share that survived rounding.
        untied: keys that were one parameter in the base and no longer are.
        left_out: tensors of the base that the merged model does not have.
        files: size and sha256 of the weight files, by name, as written and as read back.
        compared: values of the result that were read back and compared with a second computation.
        quantized: the choice for a quantized base: `original`, `dequantized` or `requantized`; else None.
        ends: tokens that end an answer in the adapters' chat template, added to `generation_config.json`.
        logits: None unless their comparison was requested.
        bytes: size of the folder.
        seconds: time of the whole merge.
    """

    out: Path
    base: str
    adapters: Mapping[str, float]
    dtype: str
    counts: Mapping[str, int]
    tensors: tuple[Retention, ...]
    untied: tuple[str, ...]
    left_out: tuple[str, ...]
    files: Mapping[str, FileDigest]
    compared: int
    quantized: str | None = None
    ends: tuple[str, ...] = ()
    logits: LogitCheck | None = None
    bytes: int = 0
    seconds: float = 0.0

    @property
    def worst(self) -> Retention | None:
        """The tensor of which least survived; None where no adapter has LoRA weights."""
        return min(self.tensors, key=lambda tensor: tensor.retained, default=None)

    @property
    def retention(self) -> float:
        """The share that survived, as the mean over the tensors; 1 where no adapter has LoRA weights."""
        return sum(tensor.retained for tensor in self.tensors) / len(self.tensors) if self.tensors else 1.0

    def to_json(self) -> dict[str, object]:
        """Return every field and `retention` as JSON values."""
        fields = {**asdict(self), "out": str(self.out), "retention": self.retention}
        fields["tensors"] = [
            {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in one.items()
            }
            for one in map(asdict, self.tensors)
        ]
        return fields

    def page(self, task: str, *, name: str) -> str:
        """Return the model card of the result, a model of this task in a folder of this name."""
        adapters = ", ".join(
            digest[:12] + (f" × {weight:g}" if weight != 1 else "") for digest, weight in self.adapters.items()
        )
        facts = [
            ("base", make_folder_portable(self.base)),
            ("adapters", adapters),
            ("dtype", self.dtype),
            *([("quantized base", f"merged into the {self.quantized} weights")] if self.quantized else []),
            ("tensors", ", ".join(f"{count:,} {how}" for how, count in self.counts.items())),
            ("delta that survived rounding", f"{self.retention:.1%} on average"),
            ("compared with a second computation", f"{self.compared:,} numbers"),
        ]
        facts += [("untied", ", ".join(self.untied))] if self.untied else []
        facts += [("left out of the base", ", ".join(self.left_out))] if self.left_out else []
        facts += [("answers end with", f"{', '.join(self.ends)}, added to generation_config.json")] if self.ends else []
        if self.logits is not None:
            told = f"{self.logits.largest_difference:.3g} at most; {self.logits.bound:.3g} is the bound"
            facts.append(("logits, merged beside base + adapter", told))
        worst = sorted(self.tensors, key=lambda tensor: tensor.retained)[:_WORST_SHOWN]
        sections = []
        if worst:
            rows = [(t.path, f"{t.relative:.3g}", f"{t.retained:.1%}") for t in worst]
            head = ("least survived in", "size of the delta over the weight", "share that survived")
            sections.append(format_table(rows, head=head))
        rows = [(name, f"{fact['size']:,}", fact["sha256"]) for name, fact in self.files.items()]
        sections.append(format_table(rows, head=("file", "bytes", "sha256, as read back")))
        return render_model_card(
            "A merged model",
            "A LoRA adapter folded into its base by lora_kit.",
            *sections,
            name=name,
            task=task,
            base=make_folder_portable(self.base),
            tag="merged-lora",
            facts=facts,
        )
