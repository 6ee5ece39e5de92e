"""What a training would do, before it does it."""
