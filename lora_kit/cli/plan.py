"""`plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lora_kit.cli.app import AsJson, app
from lora_kit.cli.output import format_size, print_json, print_table, print_text

if TYPE_CHECKING:
    from lora_kit.training.plan.size_plan import SizePlan

_HEADINGS = {"plain": "as it is", "gradient_checkpointing": "gradient checkpointing"}


@app.command
def plan(
    *,
    base: str,
    gpus: str | None = None,
    method: str = "lora",
    rank: Annotated[int, Parameter(name=["--rank", "-r"])] = 16,
    target: Annotated[list[str] | None, Parameter(negative="")] = None,
    length: int = 2048,
    rows: int = 1,
    dtype: str = "bf16",
    task: str | None = None,
    shard: Annotated[bool, Parameter(negative="")] = False,
    gradient_checkpointing: bool | None = None,
    json: AsJson = False,
) -> None:
    """Say how much memory a training needs and on what it fits, from the config of a base alone.

    No weight is read: whole steps are run on tensors without memory, and counted. `train --dry-run` measures a recipe
    on the machine that it is for.

    Example: lora-kit plan --base kit-base --gpus 2xH200

    Args:
        base: Hub id, local folder, the file of a config, or kit-base.
        gpus: What to train on, such as H200, 8xH200, or by its memory 2x24GB.
        method: lora; qlora, on a base in NF4; or full, every weight in fp32.
        rank: Rank of the adapter.
        target: Name of layers with LoRA weights, may be repeated; by default all linear ones.
        length: Tokens of a row.
        rows: Rows of a forward on each device.
        dtype: Of the frozen weights: bf16, fp16 or fp32.
        task: causal-lm, seq2seq, classify or tokens; by default that of the base.
        shard: Share the frozen base between the devices (train.fsdp).
        gradient_checkpointing: Count a step only with it, or only without; by default both, which takes twice as long.
    """
    from lora_kit.training.plan.size_plan import plan_size

    result = plan_size(
        base,
        gpus=gpus,
        method=method,
        r=rank,
        targets=target,
        length=length,
        rows=rows,
        dtype=dtype,
        task=task,
        shard=shard,
        gradient_checkpointing=gradient_checkpointing,
    )
    if json:
        print_json(result.to_json())
        return
    size = next(iter(result.sizes.values()))
    print_text(f"{result.base}: {size.parameters:,} parameters, {size.trainable:,} of them trained by {method}")
    print_table(("on each device", *(_HEADINGS[name] for name in result.sizes)), _format_rows(result))


def _format_rows(plan: SizePlan) -> list[tuple[str, ...]]:
    """Return the rows of the table: what takes memory, and what fits on the device that was named."""
    sizes = plan.sizes.values()
    trained = "weights, gradients, AdamW" if plan.shape.method == "full" else "adapter, gradients, AdamW"
    parts = [
        ("frozen weights", [size.weights for size in sizes]),
        (trained, [size.trained for size in sizes]),
        (f"activations of {plan.shape.rows} × {plan.shape.length:,}", [size.activations for size in sizes]),
        ("together", [size.total for size in sizes]),
    ]
    rows = [(name, *map(format_size, values)) for name, values in parts if any(values)]
    if plan.device is None:
        return rows
    counts = [plan.count_rows(size) for size in sizes]
    where = f"rows that fit on {plan.device.name} ({format_size(plan.device.bytes)})"
    rows.append((where, *(f"at least {count}" if count else "none" for count in counts)))
    seconds = [plan.estimate_least_seconds(size) for size in sizes]
    tokens = plan.shape.rows * plan.shape.length * plan.devices
    if None not in seconds:
        bounds = [f"{tokens / value:,.0f}" for value in seconds if value]
        rows.append((f"tokens/s of {plan.devices} at most", *bounds))
    return rows
