"""Try an adapter on every model class of transformers: a tiny model of each, made by shrinking its default config."""
