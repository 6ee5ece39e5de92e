"""Protocols: what this package uses of objects that other libraries make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import BatchEncoding


class Tokenizer(Protocol):
    """The part of `transformers.PreTrainedTokenizerBase` that this package uses."""

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None
    eos_token: str | None
    pad_token: str | None
    all_special_ids: list[int]
    chat_template: str | dict[str, str] | None
    special_tokens_map: dict[str, str]
    is_fast: bool
    model_max_length: int
    split_special_tokens: bool

    def __call__(self, text: object = ..., text_pair: object = ..., **options: object) -> BatchEncoding: ...

    def __len__(self) -> int: ...

    def __hash__(self) -> int: ...

    def decode(self, token_ids: object, **options: object) -> str: ...

    def batch_decode(self, sequences: object, **options: object) -> list[str]: ...

    def convert_ids_to_tokens(self, ids: object, **options: object) -> list[str]: ...

    def apply_chat_template(self, conversation: Sequence[Mapping[str, object]], **options: object) -> Any:
        """Return a text, token ids or a mapping of lists, as the options say."""

    def save_pretrained(self, save_directory: str | PathLike[str], **options: object) -> object: ...
