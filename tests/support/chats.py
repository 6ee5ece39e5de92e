"""Conversations, the chat templates that TRL ships, and tokenizers that know their special tokens."""

from __future__ import annotations

import functools
import re
from importlib import util
from pathlib import Path
from typing import Any, Final

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lora_kit.data.messages import Conversation, Message

_SPECIAL: Final = re.compile(
    r"<\|[\w\"]+\|?>|<\w+\|>|<｜[^>]*?｜>|<(?:start|end)_of_\w+>|\[/?[A-Z_]+\]|\[gMASK\]|<sop>|<end_of_utterance>"
)
"""What looks like a special token in a template."""
_SPEECH: Final = "Assistant:\n\nUser: hello world, the answer is here\n ▁the ▁answer question reply thought assistant"


def conversation(*turns: tuple[str, str], tools: str = "", variables: str = "") -> Conversation:
    """Build a conversation of roles and texts."""
    return Conversation(tuple(Message(role, text) for role, text in turns), tools, variables)


@functools.cache
def load_trl_templates() -> dict[str, str]:
    """Return the chat templates of the installed TRL by name; empty without TRL."""
    spec = util.find_spec("trl")
    if spec is None or spec.origin is None:
        return {}
    folder = Path(spec.origin).parent / "chat_templates"
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}


def list_specials(text: str) -> list[str]:
    """Return what looks like a special token in a template."""
    return sorted({*_SPECIAL.findall(text)})


def byte_level_tokenizer(specials: list[str]) -> Any:
    """Build a byte-level BPE like those of GPT-2, Llama 3 and Qwen: any text becomes tokens and the same text again."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator([_SPEECH] * 9, trainer)
    return _wrap(model, specials)


def prefix_space_tokenizer(specials: list[str], *, scheme: str = "first") -> Any:
    """Build a BPE like Llama 2's: it puts a space before a text, and bytes stand for letters that it does not know.

    Args:
        scheme: `first` to put it before a text, `always` to put it after every special token, too.
    """
    model = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model.decoder = decoders.Sequence(steps)
    model.normalizer = normalizers.NFC()
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", *bytes_], show_progress=False)
    model.train_from_iterator([_SPEECH] * 9, trainer)
    return _wrap(model, specials)


def _wrap(model: Tokenizer, specials: list[str]) -> Any:
    model.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ["<s>", "</s>", *specials]])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=10**6
    )
