"""States of the tokens of a text, by sentence-transformers: an encoder, and its own `load_adapter`."""

import sentence_transformers
import torch
from reading import run_jobs


@torch.no_grad()
def compute(job):
    model = sentence_transformers.SentenceTransformer(job["base"], device="cpu")
    if job["adapter"]:
        model.load_adapter(job["adapter"])
    ids = torch.tensor([job["tokens"]])
    return model[0]({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["token_embeddings"][0].numpy()


run_jobs(compute, f"sentence-transformers {sentence_transformers.__version__}")
