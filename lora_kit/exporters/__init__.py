"""Adapters for other readers: the same updates, with nothing in them that the reader passes over without a word."""
