"""Folding the merged weights and writing them to the disk."""
