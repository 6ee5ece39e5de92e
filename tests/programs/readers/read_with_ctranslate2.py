"""Logits of CTranslate2 on a model folder that its own converter reads."""

import tempfile

import ctranslate2
import numpy as np
import transformers
from reading import run_jobs


def compute(job):
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["base"])
    with tempfile.TemporaryDirectory() as folder:
        converter = ctranslate2.converters.TransformersConverter(job["base"])
        converter.convert(folder, force=True)
        generator = ctranslate2.Generator(folder, device="cpu", compute_type="float32")
        words = [tokenizer.convert_ids_to_tokens(job["tokens"])]
        return np.array(generator.forward_batch(words, return_log_probs=False))[0]


run_jobs(compute, f"ctranslate2 {ctranslate2.__version__}")
