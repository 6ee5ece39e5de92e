"""Logits of PEFT's own `PeftModel.from_pretrained`."""

import peft
import torch
import transformers
from reading import run_jobs


@torch.no_grad()
def compute(job):
    model = transformers.AutoModelForCausalLM.from_pretrained(job["base"], torch_dtype=torch.float32)
    if job["adapter"]:
        model = peft.PeftModel.from_pretrained(model, job["adapter"])
    return model.eval()(input_ids=torch.tensor([job["tokens"]])).logits[0].float().numpy()


run_jobs(compute, f"peft {peft.__version__}, transformers {transformers.__version__}")
