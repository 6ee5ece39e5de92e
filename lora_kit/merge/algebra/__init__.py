"""Adapters made of adapters, in rank space: combined, resized, extracted from a full fine-tune, compared."""

from lora_kit.merge.algebra.combining import METHODS, combine
from lora_kit.merge.algebra.comparing import Comparison, Likeness, compare, spectrum
from lora_kit.merge.algebra.extracting import extract
from lora_kit.merge.algebra.resizing import resize

__all__ = ["METHODS", "Comparison", "Likeness", "combine", "compare", "extract", "resize", "spectrum"]
