"""Adapters for other readers: the same updates, with nothing in them that the reader passes over without a word."""

from lora_kit.merge.export.run import TARGETS, Export, Verdict, check, export

__all__ = ["TARGETS", "Export", "Verdict", "check", "export"]
