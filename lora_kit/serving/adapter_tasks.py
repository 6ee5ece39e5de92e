"""What an adapter of a store is for, and whether a server of a task can offer it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from lora_kit.adapter.folder import CONFIG
from lora_kit.errors import LoraKitError, format_list
from lora_kit.io.read import read_json
from lora_kit.models.tasks import CAUSAL_LM, CLASSIFY, GENERATIVE_TASKS, SEQ2SEQ, find_task_by_peft_type
from lora_kit.serving.engine import RequestError

SERVED_TASKS: Final = (CAUSAL_LM, SEQ2SEQ, CLASSIFY)
_CONFIG_BYTES: Final = 2**22
_KEPT_TASKS: Final = 4096


def read_adapter_task(folder: Path) -> str | None:
    """Return the task that an adapter's config names; None where it names none, or cannot be read."""
    try:
        stat = (folder / CONFIG).stat()
    except OSError:
        return None
    return _read_task(folder, (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))


@functools.lru_cache(maxsize=_KEPT_TASKS)
def _read_task(folder: Path, signature: tuple[int, ...]) -> str | None:
    """Read the task of a config; a file with another signature is read again."""
    try:
        spec = find_task_by_peft_type(str(read_json(folder / CONFIG, limit=_CONFIG_BYTES).get("task_type")))
    except (LoraKitError, OSError):
        return None
    return None if spec is None else spec.name


def can_offer(adapter_task: str | None, task: str | None) -> bool:
    """Return whether a server of a task answers with adapters of another: those that generate share a server.

    Args:
        adapter_task: None for an adapter that names no task; it is offered, and tried when it is asked for.
        task: of the server; None for one that offers every adapter.
    """
    if adapter_task is None or task is None:
        return True
    return adapter_task == task or (adapter_task in GENERATIVE_TASKS and task in GENERATIVE_TASKS)


def make_task_error(subject: str, adapter_task: str, task: str) -> RequestError:
    """Return the error for a request that a server of another task can answer, or no server."""
    message = f"{subject} needs task {adapter_task}, and this server is of task {task}"
    return RequestError(message, code="unsupported", field="model", hint=_suggest_command(adapter_task))


def describe_not_offered(tasks: Mapping[str, str]) -> list[str]:
    """Return a line for each task: its adapters, and the command that serves them.

    Args:
        tasks: by the names of the adapters that a server does not offer.
    """
    return [
        f"{format_list([name for name, own in tasks.items() if own == task])} ({task}): {_suggest_command(task)}"
        for task in dict.fromkeys(tasks.values())
    ]


def _suggest_command(task: str) -> str:
    return f"lora-kit serve --task {task}" if task in SERVED_TASKS else "lora-kit predict; this task is not served"
