"""Load the base of a server, and choose the engine that computes it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_kit.bank.attach import attach
from lora_kit.bank.bank import AdapterBank
from lora_kit.errors import BaseModelError, ConfigError, format_list
from lora_kit.models.checkpoint_head import read_base_config
from lora_kit.models.loading import Base, load_base
from lora_kit.models.locate import locate_base, translate_load_errors
from lora_kit.models.silence import silence_libraries
from lora_kit.models.tasks import CAUSAL_LM, CLASSIFY, SEQ2SEQ, infer_task_from_architecture
from lora_kit.serving.adapter_tasks import SERVED_TASKS, read_adapter_task
from lora_kit.serving.engine import Engine
from lora_kit.serving.forward_engine import ForwardEngine
from lora_kit.serving.generate_engine import GenerateEngine
from lora_kit.serving.label_heads import LabelHeads, find_widest_head
from lora_kit.serving.rows_engine import RowsEngine
from lora_kit.serving.server_settings import ServerSettings

logger = logging.getLogger(__name__)

_ENCODERS: Final = ("ForMaskedLM", "ForPreTraining", "Model")
"""How the names of classes end that only read texts; `LMHeadModel` writes them."""


@dataclass(frozen=True)
class OpenedBase:
    """A base that is ready to be served.

    Attributes:
        base: loaded.
        bank: attached to it.
        engine: that computes both.
        heads: of a classifier; None for a base that generates.
    """

    base: Base
    bank: AdapterBank
    engine: Engine
    heads: LabelHeads | None


def open_base(settings: ServerSettings, task: str, folders: Sequence[Path]) -> OpenedBase:
    """Load a base for a task, and attach a bank.

    Args:
        task: as `choose_task` returns it.
        folders: of the adapters that are offered.

    Raises:
        ConfigError: a setting is wrong.
        BaseModelError: it cannot be loaded, or does not do its task.
    """
    widest = max(settings.labels, find_widest_head(folders)) if task == CLASSIFY else 0
    base = load_base(settings.base, task=task, dtype=settings.dtype, quantize=settings.quantize)
    heads = LabelHeads(base, width=widest) if task == CLASSIFY else None
    bank = attach(base.model, slots=settings.slots, max_rank=settings.max_rank)
    return OpenedBase(base, bank, _choose_engine(base, bank, settings), heads)


def choose_task(settings: ServerSettings, folders: Sequence[Path]) -> str:
    """Return the task of a base: what is set, else what its adapters are for, else what its own files are for.

    Raises:
        ConfigError: the setting is no task that is served.
        BaseModelError: there is no base of that name.
    """
    if settings.task is not None:
        if settings.task not in SERVED_TASKS:
            raise ConfigError(f"task {settings.task!r} is not served", hint=f"known: {format_list(SERVED_TASKS)}")
        return settings.task
    with silence_libraries(), translate_load_errors(settings.base):
        config = read_base_config(locate_base(settings.base))
    tasks = {task for folder in folders if (task := read_adapter_task(folder)) is not None}
    if CLASSIFY in tasks and not tasks & {CAUSAL_LM, SEQ2SEQ}:
        return CLASSIFY
    architecture = next(iter(config.architectures or []), "")
    reads_only = architecture.endswith(_ENCODERS) and not architecture.endswith("LMHeadModel")
    if not tasks and (reads_only or infer_task_from_architecture(architecture).name == CLASSIFY):
        return CLASSIFY
    return SEQ2SEQ if getattr(config, "is_encoder_decoder", False) else CAUSAL_LM


def _choose_engine(base: Base, bank: AdapterBank, settings: ServerSettings) -> Engine:
    if base.task == CLASSIFY:
        return ForwardEngine(base, bank, rows=settings.rows, positions=settings.context)
    if base.task == CAUSAL_LM:
        try:
            return RowsEngine(base, bank, rows=settings.rows, positions=settings.context)
        except BaseModelError as error:
            logger.warning("%s; its requests go through generate in batches", error.message)
    return GenerateEngine(base, bank, rows=settings.rows, positions=settings.context)
