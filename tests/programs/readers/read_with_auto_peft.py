"""Logits of PEFT's `AutoPeftModelForCausalLM`, which finds the base by its name in the adapter's config."""

import peft
import torch
import transformers
from reading import run_jobs


@torch.no_grad()
def compute(job):
    auto = peft.AutoPeftModelForCausalLM if job["adapter"] else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(job["adapter"] or job["base"], dtype=torch.float32)
    return model.eval()(input_ids=torch.tensor([job["tokens"]])).logits[0].float().numpy()


run_jobs(compute, f"peft {peft.__version__}, AutoPeftModel")
