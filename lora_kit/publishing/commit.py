"""Send a plan to the hub: one commit, so that nothing is ever half there."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from lora_kit.errors import PublishError, format_list
from lora_kit.io.text import shorten
from lora_kit.publishing.push import PushPlan

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json")
_OF_THE_HUB: Final = (".gitattributes",)
"""Files that the hub itself puts into a new repository."""
_REASONS: Final = {
    401: ("the token is not valid", "`hf auth login`, or set HF_TOKEN"),
    403: ("the token may not write there", "a token with write access to that organization is needed"),
    404: ("there is no such organization, or the token may not see it", "look at the id"),
    409: ("the repository was changed meanwhile; nothing was written", "push again"),
    412: ("the repository was changed meanwhile; nothing was written", "push again"),
}
"""By the status of the hub's answer: what it means, and what to do."""


@dataclass(frozen=True, kw_only=True)
class PushReport:
    """What was sent.

    Attributes:
        repository: `organization/name`.
        commit: its id on the hub.
        url: of the commit.
        files: how many there are.
        bytes: of all of them.
        removed: weight files of an earlier push that the commit removed.
    """

    repository: str
    commit: str
    url: str
    files: int
    bytes: int
    removed: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def push(plan: PushPlan, *, visibility: str = "private", replace: bool = False, message: str = "") -> PushReport:
    """Make the repository unless it is there, and commit the files of a plan, all or nothing.

    Args:
        visibility: of a new repository: `private` or `public`. One that is there keeps its own, and a public one is
            an error where `private` is asked for.
        replace: whether a repository that holds files may be written to. Other files of it stay, except weights, which
            a reader could take for those of this push.
        message: of the commit.

    Raises:
        PublishError: there is no token, access is denied, the repository holds files, was changed meanwhile, or the
            connection failed. Nothing of the plan is in the repository then; it may be there, empty.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api = _open_api()
    with _translate_errors(plan.repository):
        api.create_repo(plan.repository, private=visibility == "private", exist_ok=True)
        info = api.model_info(plan.repository)
        present = [sibling.rfilename for sibling in info.siblings or () if sibling.rfilename not in _OF_THE_HUB]
        _check_repository(plan, present, replace=replace, is_exposed=visibility == "private" and not info.private)
        stale = [name for name in present if name.endswith(_WEIGHT_SUFFIXES) and name not in plan.files]
        sizes = plan.sizes
        commit = api.create_commit(
            plan.repository,
            [
                *(
                    CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
                    for name, content in plan.files.items()
                ),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=message or f"Upload {plan.kind} with lora-kit",
            parent_commit=info.sha,
        )
    return PushReport(
        repository=plan.repository,
        commit=commit.oid,
        url=commit.commit_url,
        files=len(sizes),
        bytes=sum(sizes.values()),
        removed=tuple(stale),
    )


def _open_api() -> HfApi:
    """Return a client of the hub; raise PublishError where it is switched off, or no token is here."""
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise PublishError("the hub cannot be reached: HF_HUB_OFFLINE is set", hint="unset it")
    if not get_token():
        raise PublishError("no token of the hub is here", hint=_REASONS[401][1])
    return HfApi()


def _check_repository(plan: PushPlan, present: Sequence[str], *, replace: bool, is_exposed: bool) -> None:
    if is_exposed:
        raise PublishError(f"{plan.repository} is public", hint="push with --public, or make it private there")
    if present and not replace:
        raise PublishError(
            f"{plan.repository} holds files already: {format_list(present)}", hint="--replace writes over them"
        )


@contextmanager
def _translate_errors(repository: str) -> Iterator[None]:
    """Raise what the hub's client raises as PublishError."""
    try:
        yield
    except PublishError:
        raise
    except Exception as error:  # of the client, of its transports, or of the network
        status = _find_status(error)
        what, hint = _REASONS.get(
            status or 0, (f"the push failed: {shorten(error)}", "nothing was committed; push again")
        )
        raise PublishError(f"{repository}: {what}", hint=hint) from error


def _find_status(error: BaseException | None) -> int | None:
    """Return the status of the hub's answer that is behind an error; None where there was none."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None
