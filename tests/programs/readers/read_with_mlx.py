"""Logits of mlx-lm on a CPU."""

import importlib.metadata

import mlx.core as mx
import numpy as np
from mlx_lm import load
from reading import run_jobs

mx.set_default_device(mx.cpu)


def compute(job):
    model, _ = load(job["base"], adapter_path=job["adapter"])
    model.eval()
    logits = model(mx.array([job["tokens"]]))[0].astype(mx.float32)
    return np.array(logits)


run_jobs(compute, f"mlx-lm {importlib.metadata.version('mlx-lm')}, mlx {importlib.metadata.version('mlx')}")
