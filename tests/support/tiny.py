"""Tiny models made from configs: no network, no files, a few thousand weights each."""

from __future__ import annotations

import torch
import transformers


def llama(*, dtype: torch.dtype = torch.float32, tie: bool = False, seed: int = 0) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def gpt2(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> transformers.GPT2LMHeadModel:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(config).to(dtype).eval()


def bert(
    *, dtype: torch.dtype = torch.float32, labels: int = 3, seed: int = 0
) -> transformers.BertForSequenceClassification:
    config = transformers.BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=96,
        max_position_embeddings=64,
        num_labels=labels,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification(config).to(dtype).eval()


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert}


def batch(rows: int = 3, length: int = 7, *, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random token ids without padding: int64 (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits
