"""Repositories of the Hugging Face hub: parse their ids, and read their files from the local cache or the network."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from lora_kit.io.read import folder_exists

_PART: Final = r"[A-Za-z0-9][\w.-]*"
_HUB_ID: Final = re.compile(
    rf"(?P<repository>{_PART}(/{_PART})?)(?P<subfolder>(/{_PART})*)(@(?P<revision>[A-Za-z0-9][\w./-]*))?", re.ASCII
)
_COMMIT: Final = re.compile("[0-9a-f]{40}")
_HUB_TIMEOUT: Final = 10
"""Seconds to wait for the hub's answer."""


class HubError(Exception):
    """A repository cannot be read; the message says why."""


class HubUnreachableError(HubError):
    """The hub is offline or does not answer, so that only the local cache can be read."""


@dataclass(frozen=True)
class HubId:
    """A folder of a repository: `organization/name`, `organization/name/subfolder`, each with `@revision` or without.

    Attributes:
        repository: `organization/name`, or the name alone of an old model.
        subfolder: in the repository; empty for its root.
        revision: a branch, a tag or a commit; None for `main`.
    """

    repository: str
    subfolder: str = ""
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """Return the hub id that a text spells, or None for any other text. Nothing is looked up."""
        match = _HUB_ID.fullmatch(text)
        if match is None or ".." in text:
            return None
        return cls(match["repository"], match["subfolder"].strip("/"), match["revision"])

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return "/".join(filter(None, (self.repository, self.subfolder))) + revision

    def path_of(self, name: str) -> str:
        """Return the path of a file in the repository, by its name in the subfolder."""
        return f"{self.subfolder}/{name}" if self.subfolder else name


def split_revision(name: str) -> tuple[str, str | None]:
    """Return the name and the revision of a base named `id@revision`; a folder of that name has no revision."""
    hub_id = HubId.parse(name)
    if hub_id is None or hub_id.revision is None or folder_exists(Path(name)):
        return name, None
    return name.rpartition("@")[0], hub_id.revision


def may_be_hub_id(name: str | os.PathLike[str]) -> bool:
    """Return whether a name may be a hub id, given that no folder has it.

    `organization/name` looks like a path. It is a path if the folder before the slash exists.
    """
    is_below_a_folder = "/" in str(name) and folder_exists(Path(str(name).partition("/")[0]))
    return isinstance(name, str) and HubId.parse(name) is not None and not is_below_a_folder


def list_hub_files(hub_id: HubId) -> tuple[str, ...]:
    """Return the paths of a repository's files, asking the hub once.

    Raises:
        HubError: the hub has no such repository or revision, or shows it only after a login.
        HubUnreachableError: `HF_HUB_OFFLINE` is set, or the hub does not answer.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise HubUnreachableError("HF_HUB_OFFLINE is set")
    try:
        # One request with a time limit, before any call that would retry again and again.
        info = HfApi().model_info(hub_id.repository, revision=hub_id.revision, timeout=_HUB_TIMEOUT)
    except RevisionNotFoundError:
        raise HubError(f"the hub has {hub_id.repository}, but no revision {hub_id.revision!r} of it") from None
    except (GatedRepoError, RepositoryNotFoundError):
        raise HubError("the hub has no such model, or it needs a login") from None
    except Exception as error:  # any failure of the network, of whatever library it comes from
        raise HubUnreachableError(f"the hub did not answer ({type(error).__name__})") from None
    return tuple(sibling.rfilename for sibling in info.siblings or ())


def is_cached(hub_id: HubId, name: str) -> bool:
    """Return whether a file of the id's folder is in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(hub_id.repository, hub_id.path_of(name), None, hub_id.revision), str)


def pin_revision(hub_id: HubId, name: str) -> HubId | None:
    """Return the id with the commit that the local cache has for its branch; None where it names a commit already.

    Args:
        hub_id: without a revision, or with any.
        name: of a file that was read.
    """
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(hub_id.repository, hub_id.path_of(name), None, hub_id.revision)
    if _COMMIT.fullmatch(hub_id.revision or "") or not isinstance(cached, str):
        return None
    parts = Path(cached).parts
    return replace(hub_id, revision=parts[parts.index("snapshots") + 1])


def list_cached_files(hub_id: HubId) -> tuple[str, ...]:
    """Return the paths of a repository's files in the local cache; empty where the revision is not there."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id.repository, revision=hub_id.revision, local_files_only=True))
    except Exception:  # the hub's library has several errors for a revision that is not cached
        return ()
    return tuple(str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file())


def list_cached_revisions(repository: str) -> list[str]:
    """Return the branches and tags of a repository that are in the local cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    refs = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="model"), "refs")
    return sorted(file.relative_to(refs).as_posix() for file in refs.rglob("*") if file.is_file())


def download_snapshot(hub_id: HubId, patterns: Sequence[str], *, local_files_only: bool) -> Path:
    """Download the files of the id's folder that match a pattern; return that folder in the cache.

    Raises:
        HubError: the download failed.
    """
    from huggingface_hub import snapshot_download

    try:
        root = snapshot_download(
            hub_id.repository,
            revision=hub_id.revision,
            allow_patterns=[hub_id.path_of(pattern) for pattern in patterns],
            local_files_only=local_files_only,
        )
    except Exception as error:  # any failure of the network, of whatever library it comes from
        raise HubError(f"the download from the hub failed ({type(error).__name__})") from error
    return Path(root, hub_id.subfolder)
