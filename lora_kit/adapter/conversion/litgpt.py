"""litgpt's `lit_model.pth.lora`, with the two files that its trainer leaves beside it.

Names, shapes and the order of rows are those of litgpt from 0.5.5 on: the B of a fused `attn.qkv` has the rows of q,
then of k, then of v, each only where it is trained, and A has `r` rows for each of them (`LoRAQKVLinear`). Before that
the layer was called `attn.attn`, and its output had the rows of each group together.
https://github.com/Lightning-AI/litgpt/blob/main/litgpt/lora.py
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from lora_kit.adapter.conversion.foreign_files import ForeignFiles
from lora_kit.adapter.conversion.formats import ConversionHints, TranslatedAdapter, build_config, collect_a_and_b
from lora_kit.adapter.peft_keys import lora_weight_keys
from lora_kit.errors import AdapterError, format_list
from lora_kit.io.read import exists, read_text
from lora_kit.io.text import escape_text

SETTINGS: Final = "hyperparameters.yaml"
MODEL: Final = "model_config.yaml"
_LIMIT: Final = 2**20
"""Bytes of a settings file, at most."""
_MLP_CLASSES: Final = ("LLaMAMLP", "GemmaMLP")
"""Those whose layers are three linear ones with Llama's names in transformers."""
_FUSED_MODELS: Final = ("phi-3", "phi-4")
"""Beginnings of names of models whose layers are fused in transformers."""
_QKV: Final = ("q_proj", "k_proj", "v_proj")
_LAYER: Final = re.compile(r"transformer\.h\.(\d+)\.(attn\.proj|mlp\.fc_1|mlp\.fc_2|mlp\.proj)")
_QKV_LAYER: Final = re.compile(r"transformer\.h\.(\d+)\.attn\.qkv")
_OLD_QKV: Final = re.compile(r"transformer\.h\.\d+\.attn\.attn\.lora_[AB]")
_NAMES: Final = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
_HEAD: Final = "lm_head"


def from_litgpt(source: ForeignFiles, hints: ConversionHints) -> TranslatedAdapter:
    """Translate litgpt's LoRA of a Llama-like model: q, k and v become layers of their own, with the same updates.

    Raises:
        AdapterError: a file beside it is missing or damaged, its model is not Llama-like, or its shapes do not fit it.
    """
    old = next((key for key in source.tensors if _OLD_QKV.fullmatch(key)), None)
    if old is not None:
        raise AdapterError(
            f"{escape_text(old)} is of litgpt before 0.5.5, where the rows of q, k and v have another order",
            hint="`litgpt merge_lora` and `convert_from_litgpt` of that version make a model, and `lora-kit extract` "
            "an adapter of it",
        )
    settings, model = (_read_settings(source.weights.parent / name) for name in (SETTINGS, MODEL))
    _check_model(model)
    alpha = _require_number(settings, "lora_alpha", SETTINGS) if hints.lora_alpha is None else hints.lora_alpha
    tensors, ranks = dict[str, Tensor](), dict[str, tuple[int, float]]()
    plain = dataclasses.replace(hints, renames={})
    for path, (a, b) in collect_a_and_b(source.tensors, plain, (".lora_A", ".lora_B")).items():
        for name, own_a, own_b in _translate_layer(path, a, b, settings, model):
            renamed = hints.rename(name)
            ranks[renamed] = (own_a.shape[0], alpha)
            tensors |= dict(zip(lora_weight_keys(renamed, "linear"), (own_a, own_b), strict=True))
    config = build_config(ranks, hints, base=hints.base or _find_base(model), task_type="CAUSAL_LM")
    note = f"keys of litgpt, which has q, k and v in one layer; lora_alpha {alpha:g} of {SETTINGS}"
    return TranslatedAdapter(config, tensors, [note])


def _translate_layer(
    path: str, a: Tensor, b: Tensor, settings: Mapping[str, Any], model: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the layers of transformers that one of litgpt stands for: (path, A, B)."""
    if path == _HEAD:
        yield path, a, b
    elif match := _LAYER.fullmatch(path):
        yield f"model.layers.{match[1]}.{_NAMES[match[2]]}", a, b
    elif match := _QKV_LAYER.fullmatch(path):
        for name, own_a, own_b in _split_qkv(path, a, b, settings, model):
            yield f"model.layers.{match[1]}.self_attn.{name}", own_a, own_b
    else:
        raise AdapterError(f"{escape_text(path)} is not a layer of a Llama-like model of litgpt")


def _split_qkv(
    path: str, a: Tensor, b: Tensor, settings: Mapping[str, Any], model: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield q, k and v, those that are trained, each with its own rows of A (r, in) and of B (out, r)."""
    size = int(_require_number(model, "head_size", MODEL))
    heads = [int(_require_number(model, name, MODEL)) for name in ("n_head", "n_query_groups", "n_query_groups")]
    trained = [settings.get(name) for name in ("lora_query", "lora_key", "lora_value")]
    parts = [(name, size * count) for name, count, has in zip(_QKV, heads, trained, strict=True) if has is True]
    rank = b.shape[1]
    if not parts or a.shape[0] != rank * len(parts) or b.shape[0] != sum(rows for _, rows in parts):
        names = format_list([name for name, _ in parts])
        raise AdapterError(
            f"{escape_text(path)}: A {tuple(a.shape)} and B {tuple(b.shape)} do not hold {names} as {SETTINGS} and "
            f"{MODEL} say"
        )
    own_b = b.split([rows for _, rows in parts])
    for (name, _), one_a, one_b in zip(parts, a.split(rank), own_b, strict=True):
        yield name, one_a.contiguous(), one_b.contiguous()


def _check_model(model: Mapping[str, Any]) -> None:
    """Raise AdapterError for a model whose layers do not have Llama's names in transformers."""
    name, kind = str(model.get("name")), str(model.get("mlp_class_name"))
    if kind not in _MLP_CLASSES or name.lower().startswith(_FUSED_MODELS):
        raise AdapterError(
            f"the base is {escape_text(name)} ({escape_text(kind)}), whose layers have other names in transformers",
            hint="`litgpt merge_lora` and `litgpt convert_from_litgpt` make a model, and `lora-kit extract` an adapter",
        )


def _find_base(model: Mapping[str, Any]) -> str | None:
    """Return the hub id of the base, if its config has one."""
    of_hub = model.get("hf_config")
    named = [of_hub.get(name) for name in ("org", "name")] if isinstance(of_hub, Mapping) else []
    parts = [part for part in named if isinstance(part, str) and part]
    return "/".join(parts) if len(parts) == 2 else None


def _read_settings(file: Path) -> Mapping[str, Any]:
    """Return what litgpt wrote into a YAML file beside the weights."""
    import yaml

    if not exists(file):
        raise AdapterError(
            f"{escape_text(file)} is missing: litgpt's weights do not say it all",
            hint=f"give the folder that litgpt wrote, with {SETTINGS} and {MODEL}",
        )
    try:
        fields = yaml.safe_load(read_text(file, limit=_LIMIT))
    except yaml.YAMLError as error:
        raise AdapterError(f"{escape_text(file)} is not YAML: {escape_text(str(error).splitlines()[0])}") from None
    if not isinstance(fields, Mapping):
        raise AdapterError(f"{escape_text(file)} does not hold settings")
    return fields


def _require_number(fields: Mapping[str, Any], name: str, file: str) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise AdapterError(f"{file}: {name} is {escape_text(value)}; a number above 0 was expected")
    return float(value)
