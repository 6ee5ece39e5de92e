"""Logits of the model of a `transformers.pipeline`, which is given the adapter's folder alone."""

import torch
import transformers
from reading import run_jobs


@torch.no_grad()
def compute(job):
    pipeline = transformers.pipeline("text-generation", model=job["adapter"] or job["base"], dtype=torch.float32)
    return pipeline.model.eval()(input_ids=torch.tensor([job["tokens"]])).logits[0].float().numpy()


run_jobs(compute, f"transformers {transformers.__version__}, pipeline")
