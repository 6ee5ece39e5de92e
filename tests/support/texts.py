"""A tiny tokenizer and small data files for tests: no network, 96 tokens, one per character."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers

PAD, BOS, EOS, UNKNOWN = 0, 1, 2, 3
_CHARACTERS = string.ascii_letters + string.digits + " \n.,:;!?'-+=/()[]"


def tokenizer(*, bos: str = "", pad: str = "<pad>") -> Any:
    """One token per character; with `bos="<s>"` a BOS before every text, with `pad=""` no pad token."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *_CHARACTERS])}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    if bos:
        model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=pad or None,
        model_max_length=64,
        additional_special_tokens=[],
    )


def bert_tokenizer() -> Any:
    """One token per character, `<s>` before a text and `</s>` after it."""
    made = tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return made


def piece_tokenizer(scheme: str) -> Any:
    """Pieces of words, each with the space before it, as SentencePiece has them; by `scheme` a space is put before the
    `first` piece of a text, or `always` before what follows a special token, too."""
    model = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    words = "name Aromi food French serves And where is it? In the city centre. user assistant : | <"
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    model.train_from_iterator([words, _CHARACTERS] * 9, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A JSONL file of these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pair_tokenizer(*, types: bool = True) -> Any:
    """`<s> a </s> b </s>` for a pair of texts, as BERT has it; with `types` the second text is of type 1."""
    made = tokenizer()
    second = "$B:1 </s>:1" if types else "</s> $B </s>"
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=f"<s> $A </s> {second}", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    made.model_input_names = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    made.init_kwargs["model_input_names"] = made.model_input_names  # what is saved
    return made
