"""Frozen layers computed once for a training: whether that pays, and the file that keeps what they gave."""
