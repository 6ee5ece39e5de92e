"""Logits of llama.cpp: its libraries from npm, its ctypes definitions and converter from llama-cpp-python's source."""

import contextlib
import ctypes
import functools
import hashlib
import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
from reading import run_jobs

HOME = Path(sys.prefix)
(SOURCE,) = (HOME / "source").glob("llama_cpp_python-*")
LIBRARIES = HOME / "libraries" / "package" / "bins" / "linux-x64"
F32 = 0  # GGML_TYPE_F32, of the cache


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
    ctypes.CDLL = LenientLibrary
    return importlib.import_module("llama_cpp.llama_cpp")


api = import_bindings()
SILENT = api.llama_log_callback(lambda *_: None)
api.llama_log_set(SILENT, None)
ctypes.CDLL(str(LIBRARIES / "libggml.so")).ggml_backend_load_all_from_path(str(LIBRARIES).encode())
api.llama_backend_init()


@functools.cache
def convert_base(folder):
    """Write a base as GGUF with llama.cpp's converter, and return the file.

    The converter knows byte-level tokenizers by a digest of what they make of a sample. Tokens are given as numbers
    here, so an unknown one may pass as GPT-2's.
    """
    file = Path(folder) / f"{hashlib.sha256(folder.encode()).hexdigest()[:8]}.gguf"
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv.pop(0)); import conversion.base as b; "
        "b.TextModel.get_vocab_base_pre = lambda self, tokenizer: 'gpt-2'; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    converter = SOURCE / "vendor" / "llama.cpp"
    arguments = [converter, converter / "convert_hf_to_gguf.py", folder, "--outtype", "f32", "--outfile", file]
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    return file


@contextlib.contextmanager
def open_context(model, length):
    parameters = api.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = max(length, 32)
    parameters.type_k = parameters.type_v = F32
    context = api.llama_init_from_model(model, parameters)
    try:
        yield context
    finally:
        api.llama_free(context)


def set_adapter(context, model, file):
    adapter = api.llama_adapter_lora_init(model, str(file).encode())
    if not adapter:
        raise RuntimeError("llama_adapter_lora_init reads nothing of this file")
    scales = (ctypes.c_float * 1)(1.0)
    adapters = (ctypes.c_void_p * 1)(adapter)
    if api._lib.llama_set_adapters_lora(ctypes.c_void_p(context), adapters, ctypes.c_size_t(1), scales):
        raise RuntimeError("llama_set_adapters_lora refuses this adapter")


def compute(job):
    model = api.llama_model_load_from_file(str(convert_base(job["base"])).encode(), api.llama_model_default_params())
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
