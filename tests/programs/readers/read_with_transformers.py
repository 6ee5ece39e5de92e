"""Logits of transformers: a whole model, or a model and its own `load_adapter`."""

import torch
import transformers
from reading import run_jobs


@torch.no_grad()
def compute(job):
    model = transformers.AutoModelForCausalLM.from_pretrained(job["base"], torch_dtype=torch.float32)
    if job["adapter"]:
        model.load_adapter(job["adapter"])
    return model.eval()(input_ids=torch.tensor([job["tokens"]])).logits[0].float().numpy()


run_jobs(compute, f"transformers {transformers.__version__}")
