"""How good a model is, with an adapter or without: loss, labels and generated texts; several adapters side by side."""
