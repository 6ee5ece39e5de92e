"""Logits of llama.cpp: its libraries from npm, its ctypes definitions and converter from llama-cpp-python's source."""

import contextlib
import ctypes
import functools
import hashlib
import importlib
import logging
import os
import sys
import types
import unittest.mock
from pathlib import Path

import numpy as np
from reading import run_jobs

HOME = Path(sys.prefix)
(SOURCE,) = (HOME / "source").glob("llama_cpp_python-*")
LIBRARIES = HOME / "libraries" / "package" / "bins" / "linux-x64"
F32 = 0  # GGML_TYPE_F32, of the cache
ERROR = 4  # GGML_LOG_LEVEL_ERROR
WITHOUT_FLASH = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED


class LenientLibrary(ctypes.CDLL):
    """A library in which functions that are newer than it exist by name and do nothing."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return ctypes.CFUNCTYPE(None)(lambda: None)


def import_bindings():
    """Import llama-cpp-python's definitions alone, without the rest of that package."""
    for library in LIBRARIES.glob("*.v0.*.so"):
        plain = library.with_name(library.name.split(".v0.")[0] + ".so")
        if not plain.exists():
            plain.symlink_to(library.name)
    os.environ["LLAMA_CPP_LIB_PATH"] = str(LIBRARIES)
    package = types.ModuleType("llama_cpp")
    package.__path__ = [str(SOURCE / "llama_cpp")]
    sys.modules["llama_cpp"] = package
    for name in ("libggml-base.so", "libggml.so"):
        ctypes.CDLL(str(LIBRARIES / name), mode=ctypes.RTLD_GLOBAL)
    with unittest.mock.patch.object(ctypes, "CDLL", LenientLibrary):
        return importlib.import_module("llama_cpp.llama_cpp")


api = import_bindings()
LOG = []
COLLECT = api.llama_log_callback(lambda level, text, _: LOG.append(text.decode().strip()) if level == ERROR else None)
api.llama_log_set(COLLECT, None)
ctypes.CDLL(str(LIBRARIES / "libggml.so")).ggml_backend_load_all_from_path(str(LIBRARIES).encode())
api.llama_backend_init()


def import_converter():
    """Import llama.cpp's converter of models, which then takes the tokenizer of every base for GPT-2's.

    It knows byte-level tokenizers by a digest of what they make of a sample, stops at others, and expects SentencePiece
    files of some families. Tokens are given as numbers here.
    """
    sys.path.insert(0, str(SOURCE / "vendor" / "llama.cpp"))
    logging.disable(logging.WARNING)
    model = importlib.import_module("conversion.base").TextModel
    model.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    gemma, phi = (importlib.import_module(f"conversion.{name}") for name in ("gemma", "phi"))
    for family in (gemma.GemmaModel, gemma.Gemma2Model, gemma.Gemma3Model, phi.Phi3MiniModel):
        family.set_vocab = model._set_vocab_gpt2
    return importlib.import_module("convert_hf_to_gguf")


converter = import_converter()


@functools.cache
def convert_base(folder):
    """Return a base's GGUF file: the one in the folder, else what llama.cpp's converter writes of it."""
    for ready in Path(folder).glob("model.gguf"):
        return ready
    file = Path(folder) / f"{hashlib.sha256(folder.encode()).hexdigest()[:8]}.gguf"
    # The name, else the folder's, means to llama.cpp that some tokens exist, such as "</s>" in a "phi3".
    arguments = ["convert_hf_to_gguf.py", folder, "--outtype", "f32", "--outfile", str(file), "--model-name", "tiny"]
    try:
        with unittest.mock.patch.object(sys, "argv", arguments):
            converter.main()
    except SystemExit as end:
        raise RuntimeError(f"convert_hf_to_gguf ends with {end.code}") from end
    return file


@contextlib.contextmanager
def open_context(model, length):
    parameters = api.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = max(length, 32)
    parameters.n_threads = parameters.n_threads_batch = 1
    parameters.type_k = parameters.type_v = F32
    parameters.flash_attn_type = WITHOUT_FLASH  # which rounds to 16 bits
    context = api.llama_init_from_model(model, parameters)
    try:
        yield context
    finally:
        api.llama_free(context)


def set_adapter(context, model, file):
    adapter = api.llama_adapter_lora_init(model, str(file).encode())
    if not adapter:
        raise RuntimeError("; ".join(LOG))
    adapters = (api.llama_adapter_lora_p_ctypes * 1)(adapter)
    if api.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)):
        raise RuntimeError("llama_set_adapters_lora refuses this adapter")


def load_model(folder):
    LOG.clear()
    model = api.llama_model_load_from_file(str(convert_base(folder)).encode(), api.llama_model_default_params())
    if not model:
        raise RuntimeError("; ".join(LOG))
    return model


def compute(job):
    model = load_model(job["base"])
    tokens = job["tokens"]
    with open_context(model, len(tokens)) as context:
        if job["adapter"]:
            (file,) = Path(job["adapter"]).glob("*.gguf")
            set_adapter(context, model, file)
        batch = api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, True
        if api.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        rows = [
            np.ctypeslib.as_array(api.llama_get_logits_ith(context, place), shape=(size,))
            for place in range(len(tokens))
        ]
        logits = np.stack(rows)
        api.llama_batch_free(batch)
    api.llama_model_free(model)
    return logits


run_jobs(compute, f"llama.cpp {next(LIBRARIES.glob('libllama.v*')).name.split('.v')[1].removesuffix('.so')}")
