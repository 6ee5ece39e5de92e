"""Adapters for other programs: the same updates, without any field that the program would ignore silently."""
