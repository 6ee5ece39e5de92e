"""Adapters that other tools wrote, in our terms: older PEFT, trainers that save wrapped models, loralib, mlx-lm."""
