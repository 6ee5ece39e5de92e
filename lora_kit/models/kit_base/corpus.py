"""The text that `kit-base` is pretrained on: documents, their tokenizer, and windows of their tokens."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Final

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SEPARATOR: Final = "<|endoftext|>"
PAD: Final = "<|pad|>"
HELD_OUT_EVERY: Final = 40
# Words with their leading space, single digits, runs of punctuation, white space.
SPLIT: Final = r" ?\p{L}+(?:'\p{L}+)?| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def read_documents(path: Path) -> list[str]:
    """Return the documents of a text file, stripped, without empty ones."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [text for part in file.read().split(SEPARATOR) if (text := part.strip())]


def split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """Return (train, held out): every `HELD_OUT_EVERY`-th document is held out, or the last one of a few."""
    held = documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or documents[-1:]
    chosen = set(map(id, held))
    return [text for text in documents if id(text) not in chosen], held


def train_tokenizer(documents: list[str], vocab_size: int, *, context: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE. It has no unknown tokens, and decoding returns the text exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=context,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """Return all documents as one stream of ids, each followed by the separator: uint16 (tokens,)."""
    eos = tokenizer.eos_token_id
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    return np.concatenate([np.array([*encoding.ids, eos], dtype=np.uint16) for encoding in encodings])


class Windows:
    """Windows of `context + 1` tokens in random order: each once in a pass, with a new offset in every pass."""

    def __init__(self, stream: np.ndarray, *, context: int, batch: int, seed: int) -> None:
        self.stream, self.context, self.batch, self.seed = stream, context, batch, seed
        self.epoch = self.cursor = 0
        self._shuffle()

    def _shuffle(self) -> None:
        generator = np.random.default_rng((self.seed, self.epoch))
        offset = int(generator.integers(self.context)) if len(self.stream) > 2 * self.context else 0
        self.starts = generator.permutation(np.arange(offset, len(self.stream) - self.context, self.context))

    def seek(self, epoch: int, cursor: int) -> None:
        """Go to the window number `cursor` of a pass."""
        self.epoch, self.cursor = epoch, cursor
        self._shuffle()

    def next_batch(self) -> torch.Tensor:
        """Return the next windows: int64 (batch, context + 1)."""
        if self.cursor + self.batch > len(self.starts):
            self.seek(self.epoch + 1, 0)
        chosen = self.starts[self.cursor : self.cursor + self.batch]
        self.cursor += self.batch
        rows = [self.stream[start : start + self.context + 1] for start in chosen]
        return torch.from_numpy(np.stack(rows).astype(np.int64))
