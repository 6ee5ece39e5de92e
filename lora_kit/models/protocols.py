"""What is used of a tokenizer: any object with these works, whichever class of transformers it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Protocol


class Tokenizer(Protocol):
    """The part of `transformers.PreTrainedTokenizerBase` that this package uses."""

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None
    eos_token: str | None
    pad_token: str | None
    all_special_ids: list[int]
    chat_template: Any  # a string, or several by name
    is_fast: bool
    model_max_length: int

    def __call__(self, text: Any = ..., text_pair: Any = ..., **options: Any) -> Mapping[str, Any]: ...

    def __len__(self) -> int: ...

    def decode(self, token_ids: Any, **options: Any) -> str: ...

    def batch_decode(self, sequences: Any, **options: Any) -> list[str]: ...

    def convert_ids_to_tokens(self, ids: Any, **options: Any) -> Any: ...

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **options: Any) -> Any: ...

    def save_pretrained(self, save_directory: str | PathLike[str], **options: Any) -> Any: ...
