"""lora_kit: train a small adapter per task on a frozen base, swap adapters while it runs, merge one to ship it.

Names are imported when they are first used, so `import lora_kit` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lora_kit.version import __version__

if TYPE_CHECKING:
    from lora_kit import data
    from lora_kit.adapter import Adapter
    from lora_kit.bank import AdapterBank, attach
    from lora_kit.bridge.adopt import adopt  # the module has the function's name, which type checkers would take
    from lora_kit.config import LoraConfig
    from lora_kit.errors import LoraKitError
    from lora_kit.evaluate import evaluate
    from lora_kit.merge import merge
    from lora_kit.merge.algebra import combine, extract, resize
    from lora_kit.merge.export import export
    from lora_kit.models import load_base
    from lora_kit.train import train
    from lora_kit.train.sweep import sweep


_HOMES = {
    "Adapter": "lora_kit.adapter",
    "AdapterBank": "lora_kit.bank",
    "LoraConfig": "lora_kit.config",
    "LoraKitError": "lora_kit.errors",
    "adopt": "lora_kit.bridge",
    "attach": "lora_kit.bank",
    "combine": "lora_kit.merge.algebra",
    "data": "lora_kit.data",
    "evaluate": "lora_kit.evaluate",
    "export": "lora_kit.merge.export",
    "extract": "lora_kit.merge.algebra",
    "load_base": "lora_kit.models",
    "merge": "lora_kit.merge",
    "resize": "lora_kit.merge.algebra",
    "sweep": "lora_kit.train.sweep",
    "train": "lora_kit.train",
}

__all__ = [
    "Adapter",
    "AdapterBank",
    "LoraConfig",
    "LoraKitError",
    "__version__",
    "adopt",
    "attach",
    "combine",
    "data",
    "evaluate",
    "export",
    "extract",
    "load_base",
    "merge",
    "resize",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_kit' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    # A package of that name is callable itself, and is what the name means once it has been imported.
    value = home if _HOMES[name] == f"{__name__}.{name}" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
