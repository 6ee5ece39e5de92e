"""What a config covers in a model, and whether an adapter is compatible with it."""
