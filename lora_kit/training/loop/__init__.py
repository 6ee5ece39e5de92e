"""The training loop: a thin subclass of `transformers.Trainer`, and what it needs around it."""
