"""Folding an adapter into its base: refused early, verified from what was written, all or nothing."""

from lora_kit._callable import make_callable
from lora_kit.merge.report import MergeReport
from lora_kit.merge.run import merge

__all__ = ["MergeReport", "merge"]

make_callable(__name__)
