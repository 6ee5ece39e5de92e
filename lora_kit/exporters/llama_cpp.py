"""llama.cpp: an adapter as a GGUF file, under the names and in the row order of its converted models.

What is written is what llama.cpp's own converter writes and its loader checks: `general.type` adapter, `adapter.type`
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

from lora_kit.adapter.peft_keys import LoraWeights
from lora_kit.errors import ExportError, format_list
from lora_kit.exporters.plain_lora import ExportCase
from lora_kit.exporters.servers import find_unsupported_by_all
from lora_kit.io.text import escape_text

GGUF_FILE: Final = "adapter.gguf"


@dataclass(frozen=True)
class GgufArchitecture:
    """How llama.cpp keeps the models of one transformers class.

    Attributes:
        name: its own word.
        interleaved: whether rows of q and k are reordered, as its rotary embedding turns neighbors, not halves
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
_HEAD_COUNT_FIELDS: Final = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def find_unsupported(case: ExportCase) -> Iterator[str]:
    yield from find_unsupported_by_all(case)
    config = case.require_config("llama.cpp's names and row order depend on the architecture")
    found = architecture_of(config)
    if found is None:
        yield f"the base is a {escape_text(_class_name_of(config))}; {format_list(list(ARCHITECTURES))} are converted"
        return
    names = _build_name_map(found, config)
    tied = bool(config.get("tie_word_embeddings"))
    for path in case.adapter.pairs():
        if names.get_name(path) is None:
            yield f"target_modules: {path} has no name in llama.cpp's {found.name}"
        elif tied and path.rpartition(".")[2] in ("lm_head", "embed_tokens"):
            yield f"target_modules: {path} is tied in this base, and llama.cpp would use the update in both places"


def write(case: ExportCase, folder: Path) -> None:
    """The GGUF file: float32, `<name>.weight.lora_a` (r, in) and `.lora_b` (out, r)."""
    gguf = _import_gguf()
    config = case.require_config("llama.cpp's names and row order depend on the architecture")
    found = architecture_of(config)
    assert found is not None  # it would have been refused
    writer = gguf.GGUFWriter(folder / GGUF_FILE, found.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(case.plain.alpha))
    writer.add_name(case.name)
    names = _build_name_map(found, config)
    for path, pair in case.plain.pairs.items():
        a, b = _orient_weights(path, pair, found, config)
        for tensor, side in ((a, "lora_a"), (b, "lora_b")):
            writer.add_tensor(f"{names.get_name(path)}.weight.{side}", tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _orient_weights(
    path: str, pair: LoraWeights, found: GgufArchitecture, config: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """A and B as llama.cpp multiplies them: q and k in its row order, A of an embedding a row per token."""
    leaf = path.rpartition(".")[2]
    if pair.kind == "embedding":
        return pair.a.T, pair.b
    if found.interleaved and leaf in _HEAD_COUNT_FIELDS:
        return pair.a, interleave_heads(pair.b, config[_HEAD_COUNT_FIELDS[leaf]])
    return pair.a, pair.b


def interleave_heads(rows: Tensor, heads: int) -> Tensor:
    """Rows of every head's first and second half in turn: what the rotary embedding turns together, side by side."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).transpose(1, 2).reshape(rows.shape)


def architecture_of(config: dict[str, Any]) -> GgufArchitecture | None:
    """How a base is kept, by its config; None where this package does not know."""
    return ARCHITECTURES.get(_class_name_of(config))


def _class_name_of(config: dict[str, Any]) -> str:
    classes = config.get("architectures") or []
    return str(classes[0]) if classes else f"model without architectures, model_type {config.get('model_type')}"


def _build_name_map(found: GgufArchitecture, config: dict[str, Any]) -> Any:
    """The `gguf` package's map from transformers' module paths to its own."""
    gguf = _import_gguf()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[found.name], config["num_hidden_layers"])


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ExportError("the gguf package is not installed", hint="pip install 'lora-kit[export]'") from None
    return gguf


def format_command(case: ExportCase) -> str:
    assert case.out is not None
    return f"""```sh
llama-server -m base.gguf --lora {quote(str(case.out / GGUF_FILE))}
```
`base.gguf` is the base `{case.base_name}`, converted by llama.cpp's `convert_hf_to_gguf.py`; it may be quantized."""
