"""`merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from lora_kit.cli.app import Adapters, AsJson, MergeAllow, Replace, Store, app
from lora_kit.cli.next_steps import list_model_commands, print_next
from lora_kit.cli.output import format_size, print_json, print_table, show_bytes_bar
from lora_kit.errors import ConfigError
from lora_kit.names import DEFAULT_STORE

if TYPE_CHECKING:
    from lora_kit.merging.merge_report import MergeReport

_MAX_SHOWN_TENSORS: Final = 5


@app.command
def merge(
    *,
    adapter: Adapters,
    out: Path,
    base: str | None = None,
    weight: Annotated[
        list[float] | None, Parameter(negative="", help="Weight of each adapter, in their order; by default 1.")
    ] = None,
    dtype: str | None = None,
    verify: str = "weights",
    quantized: str | None = None,
    original: str | None = None,
    replace: Replace = False,
    allow: MergeAllow = None,
    store: Store = DEFAULT_STORE,
    json: AsJson = False,
) -> None:
    """Merge adapters into their base and write a model folder.

    The files are read back and verified before the folder appears.

    Example: lora-kit merge --adapter pirate --out merged/pirate

    Args:
        out: The folder to write.
        base: Base model: hub id, local folder or kit-base; by default the one that the adapter names, where it is here.
        dtype: float32, bfloat16 or float16; by default the dtype of the base.
        verify: weights; or logits, which loads base and result and compares their logits too.
        quantized: What to merge into where the base is quantized: original, dequantized or requantized.
        original: For --quantized original: the model that the base was quantized from, a hub id or a folder.
    """
    from lora_kit.adapter.store import find_adapter
    from lora_kit.merging.merge import merge as run
    from lora_kit.models.infer_base import infer_base

    weights = weight or [1.0] * len(adapter)
    if len(weights) != len(adapter):
        raise ConfigError(
            f"{len(adapter)} adapters and {len(weights)} weights were given", hint="one --weight for each"
        )
    folders = [find_adapter(name, store=store) for name in adapter]
    with show_bytes_bar("merging") as progress:
        report = run(
            base or infer_base(adapter, store=store),
            list(zip(folders, weights, strict=True)),
            out,
            dtype=dtype,
            replace=replace,
            allow=allow or (),
            verify=verify,
            quantized=quantized,
            original=original,
            progress=progress,
        )
    if json:
        print_json(report.to_json())
        return
    print_table(("", ""), _build_merge_facts(report))
    print_table(("smallest retention", "delta / weight", "retained"), _find_worst(report))
    print_next(list_model_commands(out))


def _build_merge_facts(report: MergeReport) -> list[tuple[str, str]]:
    retention = f"{report.retention:.1%} of the delta survived rounding to {report.dtype}"
    rate = report.bytes / report.seconds if report.seconds else 0.0
    facts = [
        ("merged", str(report.out)),
        ("base", report.base),
        ("adapters", ", ".join(f"{digest[:12]} x {weight:g}" for digest, weight in report.adapters.items())),
        ("tensors", ", ".join(f"{count:,} {how}" for how, count in report.counts.items())),
        ("retention", retention if report.tensors else "no LoRA weights; modules_to_save replaced"),
        ("read back", f"{len(report.files)} files by sha256, {report.compared:,} values by a second computation"),
    ]
    if report.quantized:
        facts.append(("quantized base", f"merged into the {report.quantized} weights"))
    if report.untied:
        facts.append(("untied", ", ".join(report.untied)))
    if report.left_out:
        facts.append(("left out", ", ".join(report.left_out)))
    if report.ends:
        facts.append(("answers end with", f"{', '.join(report.ends)}, added to generation_config.json"))
    if report.logits is not None:
        check = report.logits
        facts.append(("logits", f"at most {check.largest_difference:.3g} from base + adapter; bound {check.bound:.3g}"))
        facts.append(("effect", f"the adapter changes a logit by up to {check.effect:.3g}"))
    return [
        *facts,
        ("size", format_size(report.bytes)),
        ("time", f"{report.seconds:.1f} s, {format_size(int(rate))}/s"),
    ]


def _find_worst(report: MergeReport) -> list[tuple[str, str, str]]:
    worst = sorted(report.tensors, key=lambda tensor: tensor.retained)[:_MAX_SHOWN_TENSORS]
    return [(one.path, f"{one.relative:.2%}", f"{one.retained:.1%}") for one in worst]
