"""The demo: three tasks made by code, three adapters on `kit-base`, and what one can do with them."""

from __future__ import annotations

from lora_kit.demo.run import run

__all__ = ["run"]
