"""What a training of a base needs and on which devices it fits, before anything of the base but its config is here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lora_kit.config.lora_config import ALL_LINEAR, LoraConfig
from lora_kit.errors import BaseModelError, ConfigError
from lora_kit.io.text import check_one_of, escape_text
from lora_kit.models.checkpoint_head import read_base_config
from lora_kit.models.locate import locate_base, translate_load_errors
from lora_kit.models.quantization import quantization_method_of
from lora_kit.models.silence import silence_libraries
from lora_kit.models.tasks import TASK_SPECS, infer_task_from_architecture
from lora_kit.torch_utils import parse_float_dtype
from lora_kit.training.plan.devices import Device, parse_devices
from lora_kit.training.plan.step_size import SIZED_METHODS, StepShape, StepSize, measure_step_size

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PLAIN: Final = "plain"
CHECKPOINTING: Final = "gradient_checkpointing"
"""Names of the two ways to run a step."""


@dataclass(frozen=True, kw_only=True)
class SizePlan:
    """What a training needs on each of some devices.

    Attributes:
        base: as it was given.
        shape: what is trained.
        devices: how many there are.
        device: of which kind; None where none was named.
        sizes: of a step as it is (`plain`) and with `gradient_checkpointing`, or of one of the two.
    """

    base: str
    shape: StepShape
    devices: int
    device: Device | None
    sizes: Mapping[str, StepSize]

    def count_rows(self, size: StepSize) -> int | None:
        """Return how many rows of a forward fit on a device at least; None where no device was named."""
        if self.device is None:
            return None
        free = self.device.bytes - size.weights - size.trained
        return max(0, int(free / (size.activations / self.shape.rows)))

    def estimate_least_seconds(self, size: StepSize) -> float | None:
        """Return the seconds that a forward and backward take at least: products at full speed, weights read twice."""
        if self.device is None or self.device.flops is None or self.device.bandwidth is None:
            return None
        return max(size.flops / self.device.flops, 2 * size.weights / self.device.bandwidth)

    def to_json(self) -> dict[str, object]:
        """Return the plan as JSON values."""
        return {
            "base": self.base,
            "method": self.shape.method,
            "task": self.shape.task,
            "rows": self.shape.rows,
            "length": self.shape.length,
            "devices": self.devices,
            "device": None if self.device is None else dataclasses.asdict(self.device),
            **{
                name: {
                    **dataclasses.asdict(size),
                    "total": size.total,
                    "rows_that_fit": self.count_rows(size),
                    "least_seconds": self.estimate_least_seconds(size),
                }
                for name, size in self.sizes.items()
            },
        }


def plan_size(
    base: str | Path,
    *,
    gpus: str | None = None,
    method: str = "lora",
    r: int = 16,
    targets: Sequence[str] | None = None,
    length: int = 2048,
    rows: int = 1,
    dtype: str = "bf16",
    task: str | None = None,
    shard: bool = False,
    gradient_checkpointing: bool | None = None,
) -> SizePlan:
    """Return what a training needs. No weight is read.

    Args:
        base: a hub id, a folder, the file of a config, or `kit-base`.
        gpus: such as `8xH200` or `24GB`.
        method: one of `SIZED_METHODS`.
        r: rank of the adapter.
        targets: names of the layers that it is for; None for all linear ones.
        length: tokens of a row.
        rows: of a forward on each device.
        dtype: of the frozen weights.
        task: None for that of the base's own class.
        shard: whether the devices share the frozen base.
        gradient_checkpointing: whether layers are computed again in the backward; None to count both ways.

    Raises:
        BaseModelError: no such base, or one that is not counted: it is quantized already, or has no model of the task.
        ConfigError: a value that cannot be.
        TargetError: the model has no such layers.
    """
    check_one_of("method", method, SIZED_METHODS)
    for name, value in (("length", length), ("rows", rows)):
        if value < 1:
            raise ConfigError(f"{name} {value} was given; at least 1 is expected")
    devices, device = parse_devices(gpus) if gpus else (1, None)
    lora = LoraConfig(r=r, lora_alpha=r, target_modules=ALL_LINEAR if not targets else tuple(targets))
    with silence_libraries(), translate_load_errors(str(base)):
        config = _read_config(base)
        task = task or infer_task_from_architecture(next(iter(config.architectures or []), "")).name
        check_one_of("task", task, tuple(TASK_SPECS))
        _check_countable(str(base), config, task)
    shape = StepShape(method=method, task=task, lora=lora, dtype=parse_float_dtype(dtype), rows=rows, length=length)
    ways = {PLAIN: False, CHECKPOINTING: True}
    if gradient_checkpointing is not None:
        ways = {name: way for name, way in ways.items() if way == gradient_checkpointing}
    with silence_libraries():
        sizes = {
            name: measure_step_size(config, dataclasses.replace(shape, checkpointing=way)) for name, way in ways.items()
        }
    if shard:
        sizes = {name: size.shard(devices) for name, size in sizes.items()}
    return SizePlan(base=str(base), shape=shape, devices=devices, device=device, sizes=sizes)


def _check_countable(base: str, config: PretrainedConfig, task: str) -> None:
    """Raise BaseModelError for a base that cannot be built from its config as it would be loaded."""
    import transformers

    quantized = quantization_method_of(config)
    if quantized is not None:
        raise BaseModelError(
            f"{escape_text(base)} is quantized by {escape_text(quantized)}, which is not counted",
            hint="give the unquantized base; method qlora counts it in NF4",
        )
    auto_class = TASK_SPECS[task].auto_class
    if type(config) not in getattr(transformers, auto_class)._model_mapping:
        raise BaseModelError(
            f"{escape_text(base)} is a {escape_text(config.model_type)}, of which there is no {auto_class}",
            hint=f"tasks: {', '.join(TASK_SPECS)}",
        )


def _read_config(base: str | Path) -> PretrainedConfig:
    if not Path(base).is_file():
        try:
            return read_base_config(locate_base(base))
        except BaseModelError as error:
            error.hint = "; ".join(filter(None, [error.hint, "the config.json of a base, given as a file, is enough"]))
            raise
    from transformers import AutoConfig

    config: PretrainedConfig = AutoConfig.from_pretrained(str(base), local_files_only=True, trust_remote_code=False)
    return config
