"""The sidecar files of a model: config, tokenizer, chat template, generation and processor files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from lora_kit.adapter.use_record import MODEL_RECORD, encode_model_record, find_recorded_data
from lora_kit.errors import BaseModelError, MergeError
from lora_kit.generation.end_tokens import add_answer_ends
from lora_kit.io.read import open_regular_file
from lora_kit.merging.checkpoint.meta_model import MetaModel, TaskHead
from lora_kit.models.rope_fields import add_older_rope_fields
from lora_kit.models.tasks import PROBLEM_TYPES
from lora_kit.names import CHAT_TEMPLATE_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG: Final = "config.json"
CARD: Final = "README.md"
_LEGAL_FILES: Final = ("license", "notice", "use_policy")
_MODEL_FILES: Final = re.compile(
    r"(generation|quantize|\w*processor)_config\.json|normalizer\.json"
    r"|[\w.-]*(token|vocab|merges|chat_template)[\w.-]*\.(json|txt)|dict\.txt"
    r"|.*\.(jinja|model|tiktoken|spm|vocab)"
)
"""Names of what a program reads of a model besides config and weights. Other files, such as the results of a training,
need not be true of another model."""
_TOKENIZER_PREFIXES: Final = ("tokenizer", "special_tokens_map", "added_tokens", "vocab.", "merges.", "chat_template")
_TOKENIZER_SUFFIXES: Final = {".model", ".tiktoken", ".spm", ".vocab"}
_TOKENIZER_CONFIG: Final = "tokenizer_config.json"
_TEMPLATE_FOLDER: Final = "additional_chat_templates"


def copy_sidecars(base: Path, out: Path) -> tuple[str, ...]:
    """Copy the files that a model needs besides config and weights, and its license. Returns their names."""
    return tuple(_copy_file(file, base, out, mode="xb") for file in _find_sidecars(base))


def copy_tokenizer(folder: Path, out: Path) -> None:
    """Copy the tokenizer beside an adapter over the base's, if there is one."""
    if (folder / _TOKENIZER_CONFIG).is_file():
        for file in _find_sidecars(folder):
            if file.name.startswith(_TOKENIZER_PREFIXES) or file.suffix in _TOKENIZER_SUFFIXES:
                _copy_file(file, folder, out, mode="wb")


def write_use(folder: Path, use: Mapping[str, object]) -> tuple[str, ...]:
    """Write how the merged model is asked: its record, and the chat template of its adapters, instead of the base's.

    Returns:
        Tokens that end an answer and that `generation_config.json` had not.
    """
    if not use:
        return ()
    (folder / MODEL_RECORD).write_bytes(encode_model_record(use))
    template = (find_recorded_data(use) or {}).get("chat_template")
    if isinstance(template, str):
        _replace_chat_template(folder, template)
    tokenizer: Any = load_folder_tokenizer(folder) if isinstance(template, str) else None
    return () if tokenizer is None else add_answer_ends(folder, use, tokenizer)


def _replace_chat_template(folder: Path, template: str) -> None:
    """Make a template the one of a model folder; a folder that has it already keeps its further ones, too."""
    config, file = folder / _TOKENIZER_CONFIG, folder / CHAT_TEMPLATE_FILE
    fields = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    own = file.read_text("utf-8") if file.is_file() else fields.get("chat_template")
    if own == template:
        return
    if fields.pop("chat_template", None) is not None:  # not every program looks for the file first
        config.write_bytes(f"{json.dumps(fields, indent=2, ensure_ascii=False)}\n".encode())
    shutil.rmtree(folder / _TEMPLATE_FOLDER, ignore_errors=True)
    file.write_bytes(template.encode())


def _copy_file(file: Path, folder: Path, out: Path, *, mode: Literal["xb", "wb"]) -> str:
    """Copy a file of a folder to the same place in another one. Returns its name there."""
    name = file.relative_to(folder)
    (out / name).parent.mkdir(exist_ok=True)
    with open_regular_file(file) as (source, _), (out / name).open(mode) as target:
        shutil.copyfileobj(source, target)
    return str(name)


def _find_sidecars(base: Path) -> Iterator[Path]:
    for file in sorted([*base.iterdir(), *base.glob(f"{_TEMPLATE_FOLDER}/*.jinja")]):
        is_legal = file.name.lower().startswith(_LEGAL_FILES) and file.suffix in ("", ".txt", ".md")
        if (is_legal or _MODEL_FILES.fullmatch(file.name)) and file.is_file():
            yield file


def write_config(
    base: Path, out: Path, *, changes: Mapping[str, object], without: Collection[str] = (), dtype: torch.dtype | None
) -> None:
    """Write the base's config.json with some fields changed.

    Args:
        base: folder of the base.
        out: folder of the result.
        changes: fields with their new values.
        without: fields to leave out.
        dtype: of the result; None keeps what the config says.

    Raises:
        BaseModelError: the base's config cannot be read.
    """
    try:
        fields = json.loads((base / CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{base / CONFIG} cannot be read: {error}") from None
    fields = {name: value for name, value in {**fields, **changes}.items() if name not in without}
    for part in (fields, *(value for value in fields.values() if isinstance(value, dict))):
        for name in ("tie_word_embeddings", "vocab_size"):
            if name in changes and name in part:
                part[name] = changes[name]
        for name in ("dtype", "torch_dtype"):
            if dtype is not None and name in part:
                part[name] = str(dtype).removeprefix("torch.")
    add_older_rope_fields(fields)
    (out / CONFIG).write_bytes(f"{json.dumps(fields, indent=2)}\n".encode())


def compute_config_changes(base: MetaModel, folder: Path, head: TaskHead, *, untied: bool) -> dict[str, object]:
    """Return the fields in which the config of the merged model differs from the base's.

    Args:
        base: its meta model.
        folder: of the base.
        head: of the merged model.
        untied: whether embeddings were untied.
    """
    changes: dict[str, object] = {"tie_word_embeddings": False} if untied else {}
    if base.resized_embeddings:
        changes["vocab_size"] = base.config.get_text_config().vocab_size
    if head.fields:
        config = base.config
        changes["architectures"] = [type(base.model).__name__]
        changes["id2label"], changes["label2id"] = config.id2label, config.label2id
        pad = config.get_text_config().pad_token_id
        changes["pad_token_id"] = _find_pad_token(folder) if pad is None else pad
        if head.problem is not None:
            changes["problem_type"] = PROBLEM_TYPES[head.problem]
    return changes


def check_vocabulary(folder: Path, rows: int) -> None:
    """Check that a model whose embeddings were resized has a row for every token of its tokenizer, if there is one.

    Args:
        folder: of the model.
        rows: of its embeddings.

    Raises:
        MergeError: there are fewer.
    """
    tokenizer = load_folder_tokenizer(folder)
    last = max(tokenizer.get_vocab().values(), default=0) if tokenizer else 0
    if last >= rows:
        raise MergeError(
            f"the adapter brings embeddings of {rows:,} rows, and the tokenizer has tokens up to {last:,}",
            hint="put the tokenizer that the adapter was trained with into the adapter's folder",
        )


def _find_pad_token(folder: Path) -> int | None:
    """Return the padding token: a decoder that classifies reads the last token that is not padding."""
    tokenizer = load_folder_tokenizer(folder)
    if tokenizer is None:
        return None
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    return eos if pad is None else pad


def load_folder_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a model folder; None where it has none: such a base is merged without one."""
    from transformers import AutoTokenizer

    from lora_kit.models.silence import silence_libraries

    try:
        with silence_libraries():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError):
        return None
    return tokenizer
