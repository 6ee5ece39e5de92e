"""Sweeps: one recipe trained with many values of some of its keys; the best result is kept."""

from __future__ import annotations

from lora_kit.train.sweep.run import sweep

__all__ = ["sweep"]
