"""Folding an adapter into its base: refused early, verified from what was written, all or nothing."""

from __future__ import annotations

import sys
import types
from typing import Any

from lora_kit.merge.report import MergeReport
from lora_kit.merge.whole import merge

__all__ = ["MergeReport", "merge"]


class _CallableModule(types.ModuleType):
    # Importing this package binds `lora_kit.merge` to the package; `lora_kit.merge(...)` must go on to merge.
    def __call__(self, *args: Any, **kwargs: Any) -> MergeReport:
        return merge(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
