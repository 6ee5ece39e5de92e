"""llama.cpp: an adapter as a GGUF file, with the tensor names and the row order of its converted models.

The file has what llama.cpp's own converter writes and its loader checks: `general.type` adapter, `adapter.type`
lora, one `adapter.lora.alpha`, a scale of alpha / rank; names from the `gguf` package's own map.
https://github.com/ggml-org/llama.cpp/blob/master/convert_lora_to_gguf.py
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-adapter.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Final

from torch import Tensor

from lora_kit.adapter.model_card import format_inline_code
from lora_kit.adapter.peft_keys import LoraWeights
from lora_kit.errors import ExportError, format_list
from lora_kit.exporters.plain_lora import ConfigFields, ExportCase
from lora_kit.io.text import escape_text
from lora_kit.names import KIT_BASE

GGUF_FILE: Final = "adapter.gguf"
GGUF_MODEL: Final = "model.gguf"
"""Of a whole model."""


@dataclass(frozen=True)
class GgufArchitecture:
    """How llama.cpp stores the models of one transformers class.

    Attributes:
        name: of the architecture in llama.cpp.
        interleaved: whether rows of q and k are reordered: its rotary embedding rotates neighbors, not halves
            (`permute` in https://github.com/ggml-org/llama.cpp/blob/master/conversion/llama.py).
    """

    name: str
    interleaved: bool = False


ARCHITECTURES: Final = {
    "LlamaForCausalLM": GgufArchitecture("llama", interleaved=True),
    "MistralForCausalLM": GgufArchitecture("llama", interleaved=True),
    "Qwen2ForCausalLM": GgufArchitecture("qwen2"),
    "Qwen3ForCausalLM": GgufArchitecture("qwen3"),
    "GemmaForCausalLM": GgufArchitecture("gemma"),
    "Gemma2ForCausalLM": GgufArchitecture("gemma2"),
    "Gemma3ForCausalLM": GgufArchitecture("gemma3"),
    "Phi3ForCausalLM": GgufArchitecture("phi3"),
}
KIT_BASE_NOTE: Final = """

For kit-base the converter stops with "BPE pre-tokenizer was not recognized": it knows those of published models alone.
Let `get_vocab_base_pre` in llama.cpp's `conversion/base.py` (in `convert_hf_to_gguf.py` of older versions) return
"gpt-2", and convert again. That one splits text as kit-base does, except for words with an apostrophe (don't, o'clock):
these become other tokens than in training. A prompt of token ids is exact."""
_CONFIG_REASON: Final = "llama.cpp's names and row order depend on the architecture"
_HEAD_COUNT_FIELDS: Final = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def find_unsupported(case: ExportCase) -> Iterator[str]:
    """Yield what llama.cpp cannot read."""
    config = case.require_config(_CONFIG_REASON)
    architecture = architecture_of(config)
    if architecture is None:
        yield f"the base is a {escape_text(_class_name_of(config))}; {format_list(list(ARCHITECTURES))} are supported"
        return
    names = _build_name_map(architecture, config)
    tied = bool(config.get("tie_word_embeddings"))
    for path in case.adapter.pairs():
        if names.get_name(path) is None:
            yield f"target_modules: {path} has no name in llama.cpp's {architecture.name}"
        elif tied and path.rpartition(".")[2] in ("lm_head", "embed_tokens"):
            yield f"target_modules: {path} is tied in this base, and llama.cpp would use the update in both places"


def write(case: ExportCase, folder: Path) -> None:
    """Write the GGUF file: float32, `<name>.weight.lora_a` (r, in) and `.lora_b` (out, r)."""
    gguf = _import_gguf()
    config = case.require_config(_CONFIG_REASON)
    architecture = architecture_of(config)
    assert architecture is not None  # `find_unsupported` reports it
    writer = gguf.GGUFWriter(folder / GGUF_FILE, architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(case.plain.alpha))
    writer.add_name(case.name)
    names = _build_name_map(architecture, config)
    for path, weights in case.plain.weights.items():
        a, b = _orient_weights(path, weights, architecture, config)
        for tensor, side in ((a, "lora_a"), (b, "lora_b")):
            writer.add_tensor(f"{names.get_name(path)}.weight.{side}", tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _orient_weights(
    path: str, weights: LoraWeights, architecture: GgufArchitecture, config: ConfigFields
) -> tuple[Tensor, Tensor]:
    """Return A and B in llama.cpp's layout: q and k in its row order, A of an embedding with a row for each token."""
    leaf = path.rpartition(".")[2]
    if weights.kind == "embedding":
        return weights.a.T, weights.b
    if architecture.interleaved and leaf in _HEAD_COUNT_FIELDS:
        return weights.a, interleave_heads(weights.b, config[_HEAD_COUNT_FIELDS[leaf]])
    return weights.a, weights.b


def interleave_heads(rows: Tensor, heads: int) -> Tensor:
    """Return the rows with those of each head's two halves alternating, as the rotary embedding expects them."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).transpose(1, 2).reshape(rows.shape)


def architecture_of(config: ConfigFields) -> GgufArchitecture | None:
    """Return llama.cpp's architecture for the config of a base; None where it is not supported."""
    return ARCHITECTURES.get(_class_name_of(config))


def _class_name_of(config: ConfigFields) -> str:
    classes = config.get("architectures") or []
    return str(classes[0]) if classes else f"model without architectures, model_type {config.get('model_type')}"


def _build_name_map(architecture: GgufArchitecture, config: ConfigFields) -> Any:
    """Return the `gguf` package's map from transformers' module paths to its own names."""
    gguf = _import_gguf()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[architecture.name], config["num_hidden_layers"])


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ExportError("the gguf package is not installed", hint="pip install 'lora-kit[export]'") from None
    return gguf


def format_command(case: ExportCase) -> str:
    """Return the command that loads it, in Markdown."""
    note = KIT_BASE_NOTE if case.base == KIT_BASE else ""
    file = case.template_argument
    template = "" if file is None else f" --jinja --chat-template-file {file}"
    return f"""```sh
llama-server -m base.gguf --lora {quote(f"{case.folder}/{GGUF_FILE}")}{template}
```
`base.gguf` is the base {format_inline_code(case.base_name)}, converted by llama.cpp's
`convert_hf_to_gguf.py`; it may be quantized.{note}"""
