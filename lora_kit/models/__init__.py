"""Bases: where they are found, how they are loaded, what their head is, and how a text becomes tokens."""
