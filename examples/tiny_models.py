"""Tiny models with random weights, one of each family that courses use: a folder each, as the hub has them.

    python examples/tiny_models.py tiny                  # all of them, into tiny/
    python examples/tiny_models.py tiny gpt2 bert-base   # some of them

They know nothing. They show in seconds, without a network, that a command is right; then `--base` takes the real one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

import lora_kit as lk

HIDDEN = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
DECODER = {**HIDDEN, "num_key_value_heads": 2, "max_position_embeddings": 256}
ENCODER = {**HIDDEN, "max_position_embeddings": 256}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1}
EXPERTS = {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "gpt-neo": ("GPTNeoForCausalLM", {"hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "num_layers": 2,
                                      "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 256}),
    "bert-base": ("BertForMaskedLM", ENCODER),
    "bert-large": ("BertForMaskedLM", {**ENCODER, "num_hidden_layers": 4, "hidden_size": 64}),
    "roberta": ("RobertaForMaskedLM", ENCODER),
    "albert": ("AlbertForMaskedLM", {**ENCODER, "embedding_size": 16}),
    "t5": ("T5ForConditionalGeneration", T5),
    "switch": ("SwitchTransformersForConditionalGeneration", {**T5, "num_decoder_layers": 2, **EXPERTS}),
    "mixtral": ("MixtralForCausalLM", {**DECODER, "num_local_experts": 4}),
    "camembert": ("CamembertForMaskedLM", ENCODER),
    "electra": ("ElectraForPreTraining", {**ENCODER, "embedding_size": 16}),
    "distilbert": ("DistilBertForMaskedLM", {"dim": 32, "hidden_dim": 48, "n_heads": 4, "n_layers": 2,
                                             "max_position_embeddings": 256}),
    "deberta": ("DebertaV2ForMaskedLM", {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                                         "position_buckets": 8, "share_att_key": True}),
}  # fmt: skip
"""The class that the hub's files were saved as, and the fields of its config."""


def write_tiny_model(name: str, folder: Path) -> Path:
    """Write the tiny model of one family, with a tokenizer, into a folder, and return it."""
    kind, fields = FAMILIES[name]
    tokenizer = make_tokenizer(encoder="Masked" in kind or "PreTraining" in kind)
    config_class = getattr(transformers, kind).config_class
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config_class(**fields, **ids, vocab_size=len(tokenizer)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer(*, encoder: bool) -> Any:
    """Return kit-base's tokenizer; an encoder's puts a mark before and behind each text, as BERT's does."""
    kit = lk.load_base("kit-base", dtype="fp32").tokenizer
    if not encoder:
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=kit.backend_tokenizer, eos_token=kit.eos_token, bos_token=kit.eos_token,
            pad_token=kit.pad_token, model_max_length=256)  # fmt: skip
    backend = kit.backend_tokenizer
    backend.add_special_tokens(["[CLS]", "[SEP]", "[MASK]"])
    marks = [(mark, backend.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=marks)  # fmt: skip
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", pad_token=kit.pad_token,
        model_max_length=200)  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) < 2 or set(sys.argv[2:]) - set(FAMILIES):
        sys.exit(f"python examples/tiny_models.py FOLDER [{' | '.join(FAMILIES)}]")
    transformers.utils.logging.disable_progress_bar()
    for family in sys.argv[2:] or FAMILIES:
        print(write_tiny_model(family, Path(sys.argv[1]) / family))
