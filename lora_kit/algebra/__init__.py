"""Adapters made of adapters, in rank space: combined, resized, extracted from a full fine-tune, compared."""
