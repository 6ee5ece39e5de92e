"""Logarithms of probabilities of vLLM on a CPU: of the token after each beginning of the text, all asked at once."""

import functools
import gc
import os
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}

import numpy as np
import vllm
from reading import run_jobs
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

MANY = 64  # requests and tokens


LOADED = {}  # the base of the last job: jobs come base by base


def load(folder):
    if folder not in LOADED:
        LOADED.clear()  # before the next one: the end of a model ends what another shares with it
        gc.collect()
        cleanup_dist_env_and_memory()
        LOADED[folder] = start(folder)
    return LOADED[folder]


def start(folder):
    return vllm.LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=8,
        max_model_len=MANY,
        max_num_seqs=MANY,
        max_logprobs=-1,
    )


@functools.cache
def number_of(adapter):
    return number_of.cache_info().currsize + 1


def compute(job):
    model, tokens = load(job["base"]), job["tokens"]
    settings = vllm.SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, detokenize=False)
    adapter = job["adapter"] and LoRARequest(Path(job["adapter"]).name, number_of(job["adapter"]), job["adapter"])
    prompts = [{"prompt_token_ids": tokens[: length + 1]} for length in range(len(tokens))]
    answers = model.generate(prompts, settings, lora_request=adapter or None, use_tqdm=False)
    rows = [answer.outputs[0].logprobs[0] for answer in answers]
    return np.array([[row[token].logprob for token in range(len(row))] for row in rows])


run_jobs(compute, f"vllm {vllm.__version__}")
