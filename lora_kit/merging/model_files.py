"""What belongs to a model beside its weights: config, tokenizer, chat template, generation and processor files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from lora_kit.errors import BaseModelError
from lora_kit.io.read import open_regular_file
from lora_kit.merging.checkpoint.meta_model import MetaModel, TaskHead
from lora_kit.merging.preflight import MERGE_RECORD
from lora_kit.models.tasks import CLASSIFY

CONFIG: Final = "config.json"
CARD: Final = "README.md"
_SIDECAR_SUFFIXES: Final = {".json", ".txt", ".jinja", ".model", ".tiktoken", ".spm", ".vocab"}
_LEGAL_FILES: Final = ("license", "notice", "use_policy")
_NOT_COPIED: Final = {CONFIG, CARD, MERGE_RECORD, "adapter_config.json", "lora_kit.json", "trainer_state.json"}
_TOKENIZER_PREFIXES: Final = ("tokenizer", "special_tokens_map", "added_tokens", "vocab.", "merges.", "chat_template")
_TOKENIZER_SUFFIXES: Final = {".model", ".tiktoken", ".spm", ".vocab"}
_TEMPLATE_FOLDER: Final = "additional_chat_templates"


def copy_sidecars(base: Path, out: Path) -> tuple[str, ...]:
    """Copy the files that go with a model's weights, byte for byte; code never does. Returns their names."""
    carried = []
    for file in _find_sidecars(base):
        name = file.relative_to(base)
        (out / name).parent.mkdir(exist_ok=True)
        with open_regular_file(file) as (source, _), (out / name).open("xb") as target:
            shutil.copyfileobj(source, target)
        carried.append(str(name))
    return tuple(carried)


def copy_tokenizer(folder: Path, out: Path) -> None:
    """Copy a tokenizer that lies beside an adapter, in the place of the base's; none where there is none."""
    if (folder / "tokenizer_config.json").is_file():
        for file in _find_sidecars(folder):
            if file.name.startswith(_TOKENIZER_PREFIXES) or file.suffix in _TOKENIZER_SUFFIXES:
                with open_regular_file(file) as (source, _), (out / file.name).open("wb") as target:
                    shutil.copyfileobj(source, target)


def _find_sidecars(base: Path) -> Iterator[Path]:
    for file in sorted([*base.iterdir(), *base.glob(f"{_TEMPLATE_FOLDER}/*.jinja")]):
        known = file.suffix in _SIDECAR_SUFFIXES or file.name.lower().startswith(_LEGAL_FILES)
        index = file.name.endswith(".index.json")
        if known and not index and file.name not in _NOT_COPIED and file.is_file():
            yield file


def write_config(
    base: Path, out: Path, *, changes: Mapping[str, Any], without: Collection[str] = (), dtype: torch.dtype | None
) -> None:
    """The base's config.json with these fields, and with the dtype of the result where that is another.

    Args:
        without: fields that are left out.
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
    (out / CONFIG).write_bytes(f"{json.dumps(fields, indent=2)}\n".encode())


def compute_config_changes(base: MetaModel, folder: Path, head: TaskHead, *, untied: bool) -> dict[str, Any]:
    """What the config must say of the merged model that the base's own does not."""
    changes: dict[str, Any] = {"tie_word_embeddings": False} if untied else {}
    if base.resized_embeddings:
        changes["vocab_size"] = base.config.get_text_config().vocab_size
    if head.fields:
        config = base.config
        changes["architectures"] = [type(base.model).__name__]
        changes["id2label"], changes["label2id"] = config.id2label, config.label2id
        pad = config.get_text_config().pad_token_id
        changes["pad_token_id"] = _find_pad_token(folder) if pad is None else pad
        if head.spec.name == CLASSIFY:
            changes["problem_type"] = "single_label_classification"
    return changes


def _find_pad_token(folder: Path) -> int | None:
    """The token that pads: decoders that classify look for the last one that is another."""
    from transformers import AutoTokenizer

    from lora_kit.models.silence import silence_libraries

    try:
        with silence_libraries():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return None  # a base without a tokenizer is merged as it is
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    return eos if pad is None else pad
