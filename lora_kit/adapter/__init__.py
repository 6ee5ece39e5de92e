"""Adapter: an immutable value of config and tensors that knows no model, and its folder on disk."""
