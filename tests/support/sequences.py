"""Tiny models that label words or write texts for texts, and rows for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from tokenizers import processors

from lora_kit.models.loading import Base
from tests.support import texts, tiny

TAGGED = [
    {"words": ["Ann", "met", "Bob"], "labels": ["P", "O", "P"]},
    {"words": ["go", "on"], "labels": ["O", "O"]},
    {"words": ["Eve", "is", "in", "Rome"], "labels": ["P", "O", "O", "L"]},
    {"words": ["Rome", "!"], "labels": ["L", "O"]},
    {"words": ["by", "Bob"], "labels": ["O", "P"]},
]
_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 32,
    "max_position_embeddings": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "dropout": 0.0,
    "init_std": 0.3,
}


def t5() -> Any:
    """A head that is not tied; what the decoder reads begins with the pad token."""
    config = transformers.T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        tie_word_embeddings=False,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def bart() -> Any:
    """A bias on the logits; what the decoder reads begins with the EOS, and what it writes with the BOS."""
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(**_SIZES, decoder_start_token_id=2, forced_bos_token_id=1)
    )


def m2m() -> Any:
    """No method of its own that says what the decoder reads."""
    return transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(**_SIZES, decoder_start_token_id=2))


def marian() -> Any:
    """A frozen bias on the logits, and positions that are computed."""
    return transformers.MarianMTModel(
        transformers.MarianConfig(**_SIZES, decoder_vocab_size=96, decoder_start_token_id=0)
    )


def ended() -> Any:
    """One token per character, and `</s>` after every text."""
    made = texts.tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", texts.EOS)]
    )
    return made


BOTH: dict[str, Callable[[], Any]] = {"t5": t5, "bart": bart, "m2m": m2m, "marian": marian}


def both(kind: str = "t5") -> Base:
    """Return a tiny base that writes texts for texts."""
    torch.manual_seed(0)
    tokenizer = texts.bert_tokenizer() if kind == "bart" else ended()
    return Base(model=BOTH[kind]().eval(), tokenizer=tokenizer, name="tiny", task="seq2seq")


def tagger(kind: str = "bert") -> Base:
    """Return a tiny base that labels words, without dropout."""
    config: Any = {"bert": tiny.bert, "llama": tiny.llama, "gpt2": tiny.gpt2}[kind]().config
    config.num_labels = 3
    torch.manual_seed(0)
    model = transformers.AutoModelForTokenClassification.from_config(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokenizer = texts.bert_tokenizer() if kind == "bert" else texts.tokenizer()
    return Base(model=model.eval(), tokenizer=tokenizer, name="tiny", task="tokens")
