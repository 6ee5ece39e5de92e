"""What a merge did and how much of the adapter is in the result."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_kit.bank import Retention


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What was merged, and what the checks found.

    Attributes:
        out: the folder that was written.
        base: what the base was asked for by.
        adapter: the adapter's digest.
        dtype: of the merged weights.
        tensors: of each weight with a delta, how large that was and which share of it survived rounding to `dtype`.
        largest_difference: largest absolute difference of a logit between base + adapter and the merged folder as read
            back, both computed in fp32.
        bound: what that difference may be: a multiple of what noise of the size of one rounding to `dtype` does.
        effect: largest absolute difference the adapter itself makes to a logit; a check whose bound is not far below it
            says little.
        bytes: size of the folder.
        seconds: time of all of it.
    """

    out: Path
    base: str
    adapter: str
    dtype: str
    tensors: tuple[Retention, ...]
    largest_difference: float
    bound: float
    effect: float
    bytes: int = 0
    seconds: float = 0.0

    @property
    def worst(self) -> Retention | None:
        """The tensor that lost most; None where the adapter has no pairs."""
        return min(self.tensors, key=lambda tensor: tensor.retained, default=None)

    @property
    def retention(self) -> float:
        """Mean over the tensors; 1 where the adapter has no pairs."""
        return sum(tensor.retained for tensor in self.tensors) / len(self.tensors) if self.tensors else 1.0

    def to_json(self) -> dict[str, Any]:
        """JSON values of every field and of `retention`."""
        return {
            **asdict(self),
            "out": str(self.out),
            "tensors": list(map(asdict, self.tensors)),
            "retention": self.retention,
        }
