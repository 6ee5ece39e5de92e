"""Logits of the model that the Python code of a folder's README makes, run as it is printed."""

import re
from pathlib import Path

import torch
import transformers
from reading import run_jobs

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@torch.no_grad()
def compute(job):
    folder = Path(job["adapter"] or job["base"])
    names = {}
    if (folder / "README.md").is_file():
        (code,) = BLOCK.findall((folder / "README.md").read_text(encoding="utf-8"))
        exec(code, names)
    else:  # the base alone
        names["model"] = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return names["model"].eval()(input_ids=torch.tensor([job["tokens"]])).logits[0].float().numpy()


run_jobs(compute, f"transformers {transformers.__version__}")
