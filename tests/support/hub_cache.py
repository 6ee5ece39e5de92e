"""A made-up cache of the hub: repositories as huggingface_hub lays them out, without a network."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import huggingface_hub


def add_repository(cache: Path, repository: str, source: Path, *, revision: str = "main", subfolder: str = "") -> str:
    """Put the files of a folder into a cache as a repository's, under a revision; return its commit."""
    root = cache / f"models--{repository.replace('/', '--')}"
    commit = hashlib.sha1(f"{repository} {revision}".encode()).hexdigest()
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    ref, snapshot = root / "refs" / revision, root / "snapshots" / commit / subfolder
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit)
    for file in source.rglob("*"):
        if not file.is_file():
            continue
        data = file.read_bytes()
        blob, link = root / "blobs" / hashlib.sha256(data).hexdigest(), snapshot / file.relative_to(source)
        blob.write_bytes(data)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(blob)
    return commit


@contextlib.contextmanager
def use_cache(folder: Path) -> Iterator[None]:
    """Let the block read the cache that is in a folder, offline."""
    constants = huggingface_hub.constants
    with patch.multiple(constants, HF_HUB_CACHE=str(folder / "cache"), HF_HUB_OFFLINE=True):
        yield
