"""Proving a merge from what was written."""
