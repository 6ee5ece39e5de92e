"""lora_kit: train a small adapter per task on a frozen base, swap adapters while it runs, merge one to ship it.

Names are imported when they are first used, so `import lora_kit` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lora_kit.version import __version__

if TYPE_CHECKING:
    from lora_kit import data
    from lora_kit.adapter.adapter import Adapter
    from lora_kit.algebra.combine import combine
    from lora_kit.algebra.extract import extract
    from lora_kit.algebra.resize import resize
    from lora_kit.bank.attach import attach
    from lora_kit.bank.bank import AdapterBank
    from lora_kit.bank.peft_bridge.adopt import adopt
    from lora_kit.config.lora_config import LoraConfig
    from lora_kit.errors import LoraKitError
    from lora_kit.evaluation.evaluate import evaluate
    from lora_kit.evaluation.predict import predict
    from lora_kit.exporters.export import export
    from lora_kit.generation.generate import generate
    from lora_kit.generation.generate_file import generate_file
    from lora_kit.merging.merge import merge
    from lora_kit.models.loading import load_base
    from lora_kit.sweeps.sweep import sweep
    from lora_kit.training.together.train_many import train_many
    from lora_kit.training.train import train

_HOMES = {
    "Adapter": "lora_kit.adapter.adapter",
    "AdapterBank": "lora_kit.bank.bank",
    "LoraConfig": "lora_kit.config.lora_config",
    "LoraKitError": "lora_kit.errors",
    "adopt": "lora_kit.bank.peft_bridge.adopt",
    "attach": "lora_kit.bank.attach",
    "combine": "lora_kit.algebra.combine",
    "evaluate": "lora_kit.evaluation.evaluate",
    "export": "lora_kit.exporters.export",
    "extract": "lora_kit.algebra.extract",
    "generate": "lora_kit.generation.generate",
    "generate_file": "lora_kit.generation.generate_file",
    "load_base": "lora_kit.models.loading",
    "merge": "lora_kit.merging.merge",
    "predict": "lora_kit.evaluation.predict",
    "resize": "lora_kit.algebra.resize",
    "sweep": "lora_kit.sweeps.sweep",
    "train": "lora_kit.training.train",
    "train_many": "lora_kit.training.together.train_many",
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
    "generate",
    "generate_file",
    "load_base",
    "merge",
    "predict",
    "resize",
    "sweep",
    "train",
    "train_many",
]


def __getattr__(name: str) -> Any:
    if name == "data":  # a package of its own, which binds itself here
        return importlib.import_module(f"{__name__}.data")
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_kit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
