"""A made-up cache of the hub: repositories as huggingface_hub lays them out, without a network."""

from __future__ import annotations

import hashlib
from pathlib import Path


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
