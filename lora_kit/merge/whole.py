"""Merging with the whole model in memory: simple, and right. Needs memory for the base twice, once of it in fp32."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from lora_kit.adapter import Adapter
from lora_kit.bank import attach
from lora_kit.errors import MergeError, listed
from lora_kit.files import check_output, staged
from lora_kit.fingerprint import fingerprint
from lora_kit.merge import preflight, verify
from lora_kit.merge.report import MergeReport
from lora_kit.models import KIT_BASE, Base, load_base, quiet

FORMAT: Final = 1
"""Version of `lora_kit_merge.json`."""
_TASKS: Final[Mapping[str | None, str]] = {"CAUSAL_LM": "causal-lm", "SEQ_CLS": "classify", None: "causal-lm"}


def merge(
    base: str | Path,
    adapter: str | Path | Adapter,
    out: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    replace: bool = False,
    allow: Collection[str] = (),
) -> MergeReport:
    """Fold an adapter into its base, `W' = round(W + scaling · B A)`, and write the result as a model folder.

    The folder appears in one step, after every tensor in it was read back bit for bit and the logits of the model in it
    were found equal to those of base and adapter, within a bound that follows from the dtype. Where anything fails,
    nothing is left.

    Args:
        base: hub id, local folder or `kit-base`.
        adapter: a folder or an Adapter.
        out: the folder to write, beside its inputs, never in them.
        dtype: of the result; the base is cast to it before the adapter is added. None for the base's own.
        replace: an earlier merge in `out` may be replaced; anything else there never is.
        allow: `other-base` merges into another base than the one the adapter was made for.

    Raises:
        MergeError: a quantised base, tied weights, an adapter that is in this base already, an output inside an input.
        AdapterError, BaseMismatchError, BaseModelError: an input that cannot be read, or does not fit.
        StorageError: the output exists, or the disk refuses.
        VerificationError: what was written is not the base with the adapter.
    """
    started, out = time.perf_counter(), Path(out)
    folder = _base_folder(base)
    inputs = [path for path in (folder, None if isinstance(adapter, Adapter) else Path(adapter)) if path is not None]
    preflight.refuse_overlap(out, inputs)
    check_output(out, replace=replace, owned=preflight.is_merged_folder)
    value = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter, allow=allow)
    if folder is not None:
        preflight.refuse_unmergeable(folder, value)
    with staged(out, replace=replace, owned=preflight.is_merged_folder, needed=_weight_bytes(folder)) as staging:
        name = value.digest[:12] if isinstance(adapter, Adapter) else Path(adapter).resolve().name
        report = _merged(base, value, staging, name=name, dtype=dtype, allow=allow)
        size = _folder_bytes(staging)
    return dataclasses.replace(report, out=out, bytes=size, seconds=time.perf_counter() - started)


def _merged(
    base: str | Path,
    adapter: Adapter,
    staging: Path,
    *,
    name: str,
    dtype: str | torch.dtype | None,
    allow: Collection[str],
) -> MergeReport:
    """Merge into the staging folder and check what is in it; `out`, `bytes` and `seconds` are the caller's to set."""
    head = _head(adapter)
    loaded = load_base(base, dtype=dtype, **head)
    if getattr(loaded.model.config, "quantization_config", None) is not None:
        raise preflight.quantised(loaded.name)
    origin = fingerprint(loaded.model, name=loaded.name)
    bank = attach(loaded.model, dtype=torch.float32)
    bank.load(name, adapter, allow=allow)
    base_logits = verify.probe(loaded.model)
    with bank.using(name):
        wanted = verify.probe(loaded.model)
    changed_paths = [*adapter.pairs(), *bank.coverage(name).saved]
    tensors = tuple(bank.merge(name))
    bank.detach()
    _write(loaded, staging)
    read = load_base(staging, **head)
    verify.check_read_back(loaded.model.state_dict(), read.model.state_dict())
    found = verify.probe(read.model)
    written_as = _dtype_of(read, changed_paths)
    report = MergeReport(
        out=staging,
        base=loaded.name,
        adapter=adapter.digest,
        dtype=str(written_as).removeprefix("torch."),
        tensors=tensors,
        largest_difference=float((found - wanted).abs().max()),
        bound=verify.rounding_bound(read.model, found, paths=changed_paths, dtype=written_as),
        effect=float((wanted - base_logits).abs().max()),
    )
    verify.check_logits(report.largest_difference, report.bound, report.effect)
    _write_record(staging, report, origin=origin, earlier=_earlier(base))
    return report


def _write(loaded: Base, folder: Path) -> None:
    with quiet():
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)


def _write_record(folder: Path, report: MergeReport, *, origin: Mapping[str, Any], earlier: Sequence[str]) -> None:
    worst = report.worst
    record = {
        "format": FORMAT,
        "base": origin,
        "merged": [*earlier, report.adapter],
        "dtype": report.dtype,
        "retention": {"mean": report.retention, "worst": worst.retained if worst else 1.0},
        "logits": {"largest_difference": report.largest_difference, "bound": report.bound, "effect": report.effect},
    }
    (folder / preflight.MERGE_RECORD).write_text(
        json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8"
    )


def _head(adapter: Adapter) -> dict[str, Any]:
    """How to load the base so that the adapter fits: the task, and the size of a head that the adapter brings.

    Raises:
        MergeError: an adapter for a task that is not there yet.
    """
    kind = adapter.config.task_type
    if kind not in _TASKS:
        raise MergeError(
            f"the adapter was made for {kind}; a base for that cannot be loaded",
            hint=f"merged are: {listed([str(kind) for kind in _TASKS if kind])}",
        )
    if _TASKS[kind] == "causal-lm":
        return {"task": "causal-lm"}
    labels = adapter.record.get("labels")
    if isinstance(labels, list) and labels:
        return {"task": "classify", "label2id": {str(label): number for number, label in enumerate(labels)}}
    sizes = [tensor.shape[0] for key, tensor in adapter.saved().items() if key.endswith(".weight") and tensor.ndim == 2]
    return {"task": "classify", "num_labels": sizes[-1] if sizes else None}


def _dtype_of(base: Base, paths: Sequence[str]) -> torch.dtype:
    """The coarsest dtype among the weights that changed: it decides how much they were rounded."""
    dtypes = {p.dtype for path in paths for p in base.model.get_submodule(path).parameters() if p.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _base_folder(base: str | Path) -> Path | None:
    """The folder a base is read from, where it is a local one."""
    folder = Path(__file__).parent.parent / "kit_base" if base == KIT_BASE else Path(base).expanduser()
    return folder if folder.is_dir() else None


def _earlier(base: str | Path) -> tuple[str, ...]:
    folder = _base_folder(base)
    return preflight.merged_digests(folder) if folder else ()


def _weight_bytes(folder: Path | None) -> int:
    """About what will be written: the size of the base's weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder else 0


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
