"""How good a model is, with an adapter or without: loss, labels, and what it writes; adapters side by side."""
