"""What a merge did, how much of the adapter is in the result, and what was checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from lora_kit.adapter.model_card import format_table, render_card
from lora_kit.layers.fold import Retention

_WORST_SHOWN: Final = 10


@dataclass(frozen=True)
class LogitCheck:
    """base + adapter beside the merged model as read back, both computed in fp32 on the same tokens.

    Attributes:
        largest_difference: of a logit, absolute.
        bound: what that may be: a multiple of what noise of the size of one rounding to the result's dtype does.
        effect: the largest difference the adapter itself makes to a logit; a check whose bound is not far below it says
            little.
    """

    largest_difference: float
    bound: float
    effect: float


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What was merged, and what the checks found.

    Attributes:
        out: the folder that was written.
        base: what the base was asked for by.
        adapters: digests, each with its weight.
        dtype: of the merged weights; the coarsest, where they differ.
        quantized: what was chosen for a quantised base: `original`, `dequantized` or `requantized`; None for another.
        counts: tensors that were `copied`, `cast`, `folded`, `replaced`, `added` and written `with new rows`.
        tensors: of each weight with a delta, how large that was and which share of it survived rounding.
        untied: parameters that were one in the base and are several now.
        left_out: tensors of the base that the merged model has no place for.
        files: size and sha256 of the weight files, as written and as read back.
        compared: numbers of the result compared, after reading it back, with a second computation.
        logits: None unless they were asked for.
        bytes: size of the folder.
        seconds: time of all of it.
    """

    out: Path
    base: str
    adapters: Mapping[str, float]
    dtype: str
    counts: Mapping[str, int]
    tensors: tuple[Retention, ...]
    untied: tuple[str, ...]
    left_out: tuple[str, ...]
    files: Mapping[str, Mapping[str, Any]]
    compared: int
    quantized: str | None = None
    logits: LogitCheck | None = None
    bytes: int = 0
    seconds: float = 0.0

    @property
    def worst(self) -> Retention | None:
        """The tensor that lost most; None where no adapter has pairs."""
        return min(self.tensors, key=lambda tensor: tensor.retained, default=None)

    @property
    def retention(self) -> float:
        """Mean over the tensors; 1 where no adapter has pairs."""
        return sum(tensor.retained for tensor in self.tensors) / len(self.tensors) if self.tensors else 1.0

    def to_json(self) -> dict[str, Any]:
        """JSON values of every field and of `retention`."""
        fields = {**asdict(self), "out": str(self.out), "retention": self.retention}
        fields["tensors"] = [
            {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in one.items()
            }
            for one in map(asdict, self.tensors)
        ]
        return fields

    def page(self) -> str:
        """The model card of the result."""
        adapters = ", ".join(
            digest[:12] + (f" × {weight:g}" if weight != 1 else "") for digest, weight in self.adapters.items()
        )
        facts = [
            ("base", self.base),
            ("adapters", adapters),
            ("dtype", self.dtype),
            *([("quantised base", f"merged into the {self.quantized} weights")] if self.quantized else []),
            ("tensors", ", ".join(f"{count:,} {how}" for how, count in self.counts.items())),
            ("delta that survived rounding", f"{self.retention:.1%} on average"),
            ("compared with a second computation", f"{self.compared:,} numbers"),
        ]
        facts += [("untied", ", ".join(self.untied))] if self.untied else []
        facts += [("left out of the base", ", ".join(self.left_out))] if self.left_out else []
        if self.logits is not None:
            told = f"{self.logits.largest_difference:.3g} at most; {self.logits.bound:.3g} is the bound"
            facts.append(("logits, merged beside base + adapter", told))
        worst = sorted(self.tensors, key=lambda tensor: tensor.retained)[:_WORST_SHOWN]
        sections = ["A LoRA adapter folded into its base by lora_kit.", format_table(facts)]
        if worst:
            rows = [(t.path, f"{t.relative:.3g}", f"{t.retained:.1%}") for t in worst]
            head = ("least survived in", "size of the delta over the weight", "share that survived")
            sections.append(format_table(rows, head=head))
        rows = [(name, f"{fact['size']:,}", fact["sha256"]) for name, fact in self.files.items()]
        sections.append(format_table(rows, head=("file", "bytes", "sha256, as read back")))
        return render_card("A merged model", *sections)
