"""Convert adapters that other tools wrote: older PEFT, trainers that save wrapped models, loralib, mlx-lm."""
