"""A release tried and not made: wheel and sdist built, looked into, installed in a clean environment, every verb asked.

`make release` runs it. Nothing is uploaded; what passes is in dist/. `python -m tools.release --python python3.12`
tries the wheel with another interpreter.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tools.docs_reference import verbs

ROOT: Final = Path(__file__).resolve().parents[1]
DIST: Final = ROOT / "dist"
MAX_WHEEL_BYTES: Final = 30_000_000
IN_WHEEL: Final = (
    "lora_kit/py.typed",
    "lora_kit/models/kit_base/model.safetensors",
    "lora_kit/models/kit_base/tokenizer.json",
    "lora_kit/demo/words.json",
    *(f"lora_kit/demo/adapters/{name}/adapter_model.safetensors" for name in ("mood", "pirate", "scene")),
)
IN_SOURCE: Final = ("pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "SECURITY.md", "constraints.txt")
IN_SOURCE_FOLDERS: Final = ("lora_kit", "adapters", "docs", "examples", "tests")
NEED_EXTRAS: Final = {
    "sweep recipe.yaml --over lora.r=2,4 --train.max_steps 1 --out adapters/swept": "lora-kit[sweep]",
    "serve --base kit-base --store adapters --port 0": "lora-kit[serve]",
    "chat --base kit-base --adapter pirate": "lora-kit[serve]",
    "eval rows.jsonl --adapter adapters/made --metrics bleu": "lora-kit[eval]",
    "export adapters/made --target gguf --base kit-base --out out/gguf": "lora-kit[export]",
}
"""What asks for a package that an extra brings, and the extra that its error names."""
WORK: Final = (
    "doctor",
    "demo --adapters adapters",
    "list adapters",
    "inspect pirate",
    "generate --adapter pirate --prompt 'The boy ran.' --max-new-tokens 4",
    "prepare rows.jsonl --out data/rows",
    "train recipe.yaml",
    "eval rows.jsonl --adapter adapters/made --compare",
    "merge --adapter pirate --out merged/pirate",
    "export pirate --target vllm --out out/pirate",
    "combine --adapter pirate --weight 0.7 --adapter scene --weight 0.3 --out adapters/both",
)
"""What works without any extra."""
RECIPE: Final = "base: kit-base\ndata: rows.jsonl\ntrain: {max_steps: 2}\nout: adapters/made\n"
ROWS: Final = "".join(f'{{"prompt": "card {n}", "completion": "it is in box {n}"}}\n' for n in range(40))


class ReleaseError(Exception):
    """Something is not as a release must be."""


def build() -> tuple[Path, Path]:
    """Build the wheel and the source archive into dist/, and return them."""
    for old in DIST.glob("lora_kit-*"):
        old.unlink()
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(DIST)], cwd=ROOT)
    (wheel,), (source,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    return wheel, source


def check_contents(wheel: Path, source: Path) -> None:
    """Raise ReleaseError for a file that is missing, that has no business there, or that makes the wheel too large."""
    names = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(source) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    missing = [*(set(IN_WHEEL) - names), *(set(IN_SOURCE) - sources)]
    missing += [folder for folder in IN_SOURCE_FOLDERS if not any(name.startswith(f"{folder}/") for name in sources)]
    strange = [name for name in names if not re.match(r"lora_kit(-[\d.]+\.dist-info)?/", name) or "__pycache__" in name]
    if missing or strange or wheel.stat().st_size > MAX_WHEEL_BYTES:
        raise ReleaseError(f"missing {missing}, strange {strange}, {wheel.stat().st_size:,} bytes")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    files = {name: (ROOT / name).read_text("utf-8") for name in ("CITATION.cff", "lora_kit/version.py")}
    if wrong := [name for name, text in files.items() if version not in text]:
        raise ReleaseError(f"{wrong} do not have the version {version}")


def install(wheel: Path, environment: Path, *, interpreter: str) -> Path:
    """Install the wheel without extras into a new environment, and return its `lora-kit`."""
    if not (environment / "bin" / "python").exists():
        run([interpreter, "-m", "venv", str(environment)])
    constraints = ["-c", str(ROOT / "constraints.txt")]
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, *constraints, str(wheel)])
    run([*pip, "--force-reinstall", "--no-deps", str(wheel)])
    return environment / "bin" / "lora-kit"


def try_verbs(program: Path, folder: Path) -> int:
    """Ask each verb for help, run what needs no extra, see that the others name theirs; return how many verbs."""
    (folder / "rows.jsonl").write_text(ROWS, "utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, "utf-8")
    for verb in verbs():
        call(program, f"{verb} --help", folder)
    for command in WORK:
        print(f"  lora-kit {command}", flush=True)
        call(program, command, folder)
    for command, extra in NEED_EXTRAS.items():
        print(f"  lora-kit {command}: names {extra}", flush=True)
        if extra not in call(program, command, folder, code=2):
            raise ReleaseError(f"lora-kit {command} does not name {extra}")
    return len(verbs())


def call(program: Path, command: str, folder: Path, *, code: int = 0) -> str:
    """Run a command of the installed program, offline, and return what it says on both streams.

    Raises:
        ReleaseError: it ends with another exit code.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "PYTHONPATH": ""}
    done = subprocess.run(f"{program} {command}", shell=True, cwd=folder, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600)  # fmt: skip
    if done.returncode != code:
        raise ReleaseError(f"lora-kit {command} ended with {done.returncode}, not {code}:\n{done.stdout[-2000:]}")
    return done.stdout


def run(command: Iterable[str], *, cwd: Path | None = None) -> None:
    """Run a command quietly.

    Raises:
        ReleaseError: it fails.
    """
    done = subprocess.run([*command], cwd=cwd, text=True, capture_output=True)
    if done.returncode:
        raise ReleaseError(f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-2000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the clean environment")
    parser.add_argument("--environment", type=Path, help="where it is made, and kept; by default a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            wheel, source = build()
            check_contents(wheel, source)
            print(f"{wheel.name}: {wheel.stat().st_size:,} bytes; {source.name}: {source.stat().st_size:,} bytes")
            environment = arguments.environment or folder / "environment"
            program = install(wheel, environment.resolve(), interpreter=arguments.python)
            count = try_verbs(program, folder)
        except ReleaseError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(f"{count} verbs and {len(WORK)} commands work without extras; {len(NEED_EXTRAS)} name theirs. Not uploaded.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
