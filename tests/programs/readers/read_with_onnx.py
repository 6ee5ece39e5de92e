"""Logits of ONNX Runtime on a model that torch exported."""

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import transformers
from reading import run_jobs


class OnlyLogits(torch.nn.Module):
    """A model as a function from token ids to logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


@torch.no_grad()
def compute(job):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["base"], dtype=torch.float32, attn_implementation="eager"
    )
    tokens = torch.tensor([job["tokens"]])
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "model.onnx")
        torch.onnx.export(OnlyLogits(model.eval()), (tokens,), file, input_names=["input_ids"], dynamo=True)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return session.run(None, {"input_ids": np.array([job["tokens"]], dtype=np.int64)})[0][0]


run_jobs(compute, f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}")
