"""The table of programs: which reads or writes what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from tests.programs.converters import (
    CostCheck,
    convert_adapter,
    convert_with_ctranslate2,
    convert_with_llama_cpp,
    convert_with_mlx,
    fuse_with_mlx,
)
from tests.programs.encoders import add_with_sentence_transformers, make_encoders
from tests.programs.logit_checks import LogitCheck, write_export, write_merged, write_saved, write_with_task
from tests.programs.mergekit import MergekitCheck
from tests.programs.outcomes import Check
from tests.programs.printed_commands import MlxCommandCheck, convert_as_printed, convert_in_export
from tests.programs.trained_there import go_on_from_trl, train_whole, train_with_mlx, train_with_trl
from tests.programs.vllm_server import ServerCheck

_GEMMAS: Final = {"gemma": 1e-2, "gemma2": 1e-2, "gemma3": 1e-2}
_DORA_MIDDLE: Final = "transformers 5.23 initializes a DoRA's magnitudes anew (its names end in `.default`)"
_DORA_FAULT: Final = {"dora": _DORA_MIDDLE}
_ALPHA_OVER_R: Final = (
    "its own `convert_lora_to_gguf.py` scales every layer by `lora_alpha / r`; `--target gguf` is exact"
)
_FOLDED: Final = ("plain", "rslora", "alpha-pattern", "rank-pattern")
_HALF_WEIGHTS: Final = {"kit-base": 5e-2}
"""Where the weights are rounded to 16 bits, which is what llama.cpp's converter does where nothing is said."""
_WHOLE_FEATURES: Final = ("plain", "head", "dora")
_NO_TOKENS: Final = {"tokens": "`trainable_token_indices` came with PEFT 0.15"}
_PLAIN_BASES: Final = ("kit-base", "llama", "mistral", "qwen2", "qwen3")
_VLLM_BASES: Final = ("kit-base", "llama", "qwen2", "qwen3")
_SMALL_BASES: Final = ("llama", "qwen2")
_OUTSIDE_LAYERS_OF_QWEN2: Final = dict.fromkeys(
    ("qwen2/head", "qwen2/embedding", "qwen2/head-and-embedding"),
    "its class of Qwen 2 takes no adapter of head or embedding, and ends with an error; those of Llama and Qwen 3 do",
)
CHECKS: Final[Mapping[str, Sequence[Check]]] = {
    "peft": (
        LogitCheck(None, "read_with_peft", "saved", write_saved),
        LogitCheck(None, "read_with_peft", "peft", write_export("peft")),
        LogitCheck(None, "read_with_peft", "vllm", write_export("vllm")),
        LogitCheck(None, "read_with_printed_code", "peft, as printed", write_export("peft"), bases=_SMALL_BASES),
        LogitCheck(None, "read_with_auto_peft", "auto", write_with_task, bases=_PLAIN_BASES),
    ),
    "peft-0.10": (LogitCheck("peft-0.10", "read_with_peft", "vllm", write_export("vllm"), bases=_PLAIN_BASES),),
    "peft-0.13": (
        LogitCheck("peft-0.13", "read_with_peft", "saved", write_saved, bases=_PLAIN_BASES, known_faults=_NO_TOKENS),
    ),
    "peft-0.15": (LogitCheck("peft-0.15", "read_with_peft", "saved", write_saved, bases=_PLAIN_BASES),),
    "peft-0.17": (LogitCheck("peft-0.17", "read_with_peft", "saved", write_saved, bases=_PLAIN_BASES),),
    "transformers": (
        LogitCheck(None, "read_with_transformers", "merged", write_merged, whole=True),
        LogitCheck(None, "read_with_transformers", "saved", write_saved, known_faults=_DORA_FAULT),
        LogitCheck(
            None,
            "read_with_pipeline",
            "pipeline",
            write_export("peft"),
            bases=_SMALL_BASES,
            known_faults=_DORA_FAULT,
        ),
    ),
    "trl": (
        LogitCheck(
            None,
            "read_with_peft",
            "trained on",
            write_saved,
            make=train_with_trl,
            bases=("kit-base",),
            # Not token rows: TRL 1.16 asks the head for its bias, which PEFT's wrapper of a tied one does not have.
            features=("plain", "rslora", "rank-pattern", "dora", "whole-modules"),
            packages=("trl",),
        ),
        LogitCheck(
            None,
            "read_with_peft",
            "and here again",
            write_saved,
            make=go_on_from_trl,
            bases=("kit-base",),
            features=("plain", "dora"),
            packages=("trl",),
        ),
    ),
    "transformers-4.57": (
        LogitCheck("peft-0.17", "read_with_transformers", "merged", write_merged, whole=True, bases=_PLAIN_BASES),
        LogitCheck(
            "peft-0.17",
            "read_with_transformers",
            "method: full",
            write_saved,
            make=train_whole,
            bases=("kit-base",),
            features=(),
            whole=True,
        ),
    ),
    "llama.cpp": (
        LogitCheck("llama.cpp", "read_with_llama_cpp", "gguf", write_export("gguf"), wide_bounds=_GEMMAS),
        LogitCheck("llama.cpp", "read_with_llama_cpp", "merged", write_merged, whole=True, bases=_SMALL_BASES),
        LogitCheck(
            "llama.cpp",
            "read_with_llama_cpp",
            "by its converter",
            write_saved,
            make=convert_with_llama_cpp,
            bases=("llama",),
            features=_FOLDED,
            known_faults=dict.fromkeys(_FOLDED[1:], _ALPHA_OVER_R),
        ),
        LogitCheck(
            "llama.cpp",
            "read_with_llama_cpp",
            "gguf-model, as printed",
            write_saved,
            make=convert_as_printed,
            bases=("kit-base",),
            features=_WHOLE_FEATURES,
            wide_bounds=_HALF_WEIGHTS,
            whole=True,
        ),
        LogitCheck(
            "llama.cpp",
            "read_with_llama_cpp",
            "ollama-model",
            write_saved,
            make=convert_in_export,
            bases=("kit-base",),
            features=_WHOLE_FEATURES,
            wide_bounds=_HALF_WEIGHTS,
            whole=True,
        ),
        CostCheck("llama.cpp", "gguf", {"gguf": convert_adapter}),
    ),
    "mlx": (
        LogitCheck("mlx", "read_with_mlx", "mlx", write_export("mlx"), wide_bounds=_GEMMAS),
        LogitCheck("mlx", "read_with_mlx", "merged", write_merged, whole=True, bases=_PLAIN_BASES),
        MlxCommandCheck("kit-base", ("plain", "dora")),
        LogitCheck("mlx", "read_with_mlx", "trained there", write_saved, make=train_with_mlx, bases=("kit-base",)),
        CostCheck("mlx", "mlx-lm", {"fused": fuse_with_mlx, "converted": convert_with_mlx}),
    ),
    "vllm": (
        LogitCheck(
            "vllm",
            "read_with_vllm",
            "vllm",
            write_export("vllm"),
            bases=_VLLM_BASES,
            known_faults=_OUTSIDE_LAYERS_OF_QWEN2,
            normalized=True,
        ),
        ServerCheck("kit-base"),
    ),
    "ctranslate2": (
        LogitCheck("ctranslate2", "read_with_ctranslate2", "merged", write_merged, whole=True, bases=_SMALL_BASES),
        CostCheck("ctranslate2", "ctranslate2", {"converted": convert_with_ctranslate2}),
    ),
    "mergekit": (MergekitCheck(("llama",)),),
    "sentence-transformers": (
        LogitCheck(
            "sentence-transformers",
            "read_with_sentence_transformers",
            "saved",
            write_saved,
            make=make_encoders,
            bases=("kit-base",),
            known_faults=_DORA_FAULT,
        ),
        LogitCheck(
            "sentence-transformers",
            "read_with_sentence_transformers",
            "saved there",
            write_saved,
            make=add_with_sentence_transformers,
            bases=("kit-base",),
        ),
    ),
    "onnx": (
        LogitCheck(
            "onnx",
            "read_with_onnx",
            "merged",
            write_merged,
            whole=True,
            bases=("llama",),
            features=("plain", "dora", "head"),
        ),
    ),
}
"""By program."""


def iterate_checks(only: Sequence[str], forms: Sequence[str] = ()) -> Iterator[tuple[str, Check]]:
    """Yield (program, check); all of them where no programs or no forms are named."""
    for program, checks in CHECKS.items():
        if not only or program in only:
            yield from ((program, check) for check in checks if not forms or check.form in forms)
