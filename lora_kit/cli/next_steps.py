"""The commands that a verb prints at its end: what people do next with what it made or showed.

Each runs as it is printed. A verb whose output is data, as `generate`, and one that was asked for JSON print none.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lora_kit.cli.output import print_text
from lora_kit.io.text import format_path_argument
from lora_kit.names import DEFAULT_STORE, REWARD_OBJECTIVE, TEST_FILE

if TYPE_CHECKING:
    from lora_kit.config.lora_config import LoraConfig
    from lora_kit.training.recipe.recipe import Recipe
    from lora_kit.training.results import TrainReport

_CHAT_PACKAGES: Final = ("limits", "prometheus_client")
"""What `chat` imports of the extra `serve`."""
_SERVER: Final = "vllm"
"""The target that `check` is shown with."""


def print_next(commands: Iterable[str]) -> None:
    """Print the commands that come next, each on a line of its own; nothing where there are none."""
    lines = list(commands)
    if lines:
        print_text("\n  ".join(["\nnext:", *lines]))


def build_command(verb: str, *words: object) -> str:
    """Return a command of ours, quoted for a shell."""
    return shlex.join(["lora-kit", verb, *map(format_word, words)])


def format_word(word: object) -> str:
    """Return an argument as a word of a command."""
    return format_path_argument(word) if isinstance(word, Path) else str(word)


def build_flags(name: str, values: object) -> list[str]:
    """Return the flag of an argument as it was given, once for each of several values; none for None."""
    items = values if isinstance(values, (list, tuple)) else [] if values is None else [values]
    return [word for item in items for word in (f"--{name}", format_word(item))]


def build_loading_flags(base: str | None, allow: Sequence[str] | None, store: Path) -> list[str]:
    """Return the flags with which an adapter was loaded, for the next command that loads it."""
    stores = [] if store == DEFAULT_STORE else build_flags("store", store)
    return [*build_flags("base", base), *build_flags("allow", allow), *stores]


def build_using_command(task: str, *flags: object, of_pairs: object = False) -> str:
    """Return the command that asks a model something: for labels where those are its task, else for a text.

    Args:
        task: one of `lora_kit.models.tasks.TASKS`.
        flags: which adapters and base.
        of_pairs: whether it reads pairs of texts; what an adapter's record says.
    """
    from lora_kit.models.tasks import LABEL_TASKS

    if task in LABEL_TASKS:
        return build_command("predict", *flags, "a text", *(["--text-pair", "another text"] if of_pairs else []))
    return build_command("generate", *flags, "--prompt", "a prompt")


def list_training_commands(recipe: Recipe, *, of_pairs: object = False) -> Iterator[str]:
    """Yield the commands that measure and use what a recipe trains; `of_pairs` as in `build_using_command`.

    A preference or a reward is measured in training only, and so is a whole model, which is asked as a base.
    """
    from lora_kit.models.tasks import LABEL_TASKS
    from lora_kit.training.recipe.objectives import SFT

    if recipe.method == "peft":  # PEFT's own model reads it
        return
    is_whole = recipe.method == "full"
    if recipe.objective == SFT and not is_whole:
        compared = [] if recipe.task in LABEL_TASKS else ["--compare"]  # a new head of a base says nothing
        for file in _list_rows_to_measure(recipe):
            yield build_command("eval", file, "--adapter", Path(recipe.out), *compared)
    if recipe.objective != REWARD_OBJECTIVE:
        flag = "--base" if is_whole else "--adapter"
        yield build_using_command(recipe.task, flag, Path(recipe.out), of_pairs=of_pairs)
        if recipe.data.chat_template and _has_chat_packages():
            yield build_command("chat", flag, Path(recipe.out))


def _list_rows_to_measure(recipe: Recipe) -> list[Path]:
    """Return the files that were set aside for a test; without any, those of validation, whose figures are known."""
    from lora_kit.data.mixture import list_files

    files = [Path(file.path) for file in list_files(recipe.data.validation)] if recipe.data.validation else []
    return [test for file in files if (test := file.with_name(TEST_FILE)).is_file()] or files


def list_joint_commands(reports: Sequence[TrainReport]) -> Iterator[str]:
    """Yield the commands that measure and use several trainings of one base: those that go together side by side."""
    from lora_kit.training.recipe.objectives import SFT

    adapters = [report for report in reports if report.method not in ("peft", "full")]
    measured: dict[tuple[str, Path], list[TrainReport]] = {}
    used: dict[tuple[str, bool], list[TrainReport]] = {}
    for report in adapters:
        if report.recipe.objective == SFT:
            for file in _list_rows_to_measure(report.recipe):
                measured.setdefault((report.task, file), []).append(report)
        if report.recipe.objective != REWARD_OBJECTIVE:
            used.setdefault((report.task, report.text_pairs), []).append(report)
    for (_, file), group in measured.items():
        yield build_command("eval", file, *build_flags("adapter", [report.out for report in group]))
    for (task, of_pairs), group in used.items():
        flags = build_flags("adapter", [report.out for report in group])
        yield build_using_command(task, *flags, of_pairs=of_pairs)


def _is_chat(record: Mapping[str, object]) -> bool:
    """Return whether a record is of a model that was trained on conversations, and `chat` can run here."""
    from lora_kit.adapter.use_record import find_recorded_data

    return bool((find_recorded_data(record) or {}).get("chat_template")) and _has_chat_packages()


def _has_chat_packages() -> bool:
    return all(importlib.util.find_spec(name) for name in _CHAT_PACKAGES)


def list_adapter_commands(
    name: str,
    config: LoraConfig,
    record: Mapping[str, object],
    *,
    flags: Sequence[str] = (),
) -> Iterator[str]:
    """Yield the commands that use an adapter, merge it and check whether a server takes it.

    None where its base is not on this machine: they would need it.

    Args:
        name: of the adapter, as it is found.
        config: of the adapter.
        record: content of its `lora_kit.json`; empty without one.
        flags: with which it was loaded.
    """
    from lora_kit.models.infer_base import NamedBase
    from lora_kit.models.tasks import CAUSAL_LM, find_task_by_peft_type

    if NamedBase.of(config, record.get("base")).problem is not None:
        return
    spec, recipe = find_task_by_peft_type(config.task_type), record.get("recipe")
    task = spec.name if spec else CAUSAL_LM
    if not (isinstance(recipe, Mapping) and recipe.get("objective") == REWARD_OBJECTIVE):
        yield build_using_command(task, "--adapter", name, *flags, of_pairs=record.get("text_pairs"))
        if _is_chat(record) and "--allow" not in flags:
            yield build_command("chat", "--adapter", name, *flags)
    yield build_command("merge", "--adapter", name, *flags, "--out", Path("merged", Path(name).name))
    is_plain = not (config.use_dora or config.modules_to_save or config.target_parameters)
    if task == CAUSAL_LM and is_plain and not config.trainable_token_indices:
        yield build_command("check", name, *flags, "--target", _SERVER)


def list_model_commands(folder: Path) -> Iterator[str]:
    """Yield the commands that use a merged model, and show what would be sent to the hub."""
    from lora_kit.models.model_record import read_folder_record
    from lora_kit.models.tasks import CAUSAL_LM
    from lora_kit.publishing.published_folder import open_published_folder

    model, use = open_published_folder(folder), read_folder_record(folder)
    yield build_using_command(model.task or CAUSAL_LM, "--base", folder, of_pairs=use.get("text_pairs"))
    if _is_chat(use):
        yield build_command("chat", "--base", folder)
    named = [] if model.base_on_hub else ["--base", "organization/base"]
    repository = re.sub(r"[^A-Za-z0-9]+", "-", folder.name).strip("-") or "model"  # names of the hub are ASCII
    yield build_command("push", folder, "--repo", f"me/{repository}", *named, "--dry-run")
