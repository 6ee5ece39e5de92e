"""`merge`: from a base's files and an adapter to a model folder, all or nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_location import label_adapter_folder, resolve_folder
from lora_kit.adapter.folder import ALLOWANCES
from lora_kit.errors import ConfigError, MergeError, format_list
from lora_kit.io.atomic_write import check_output, stage_folder
from lora_kit.merging import model_files, preflight
from lora_kit.merging import quantized_base as quantisation
from lora_kit.merging.checkpoint.bnb_weights import QuantizedWeight
from lora_kit.merging.checkpoint.meta_model import TaskHead, build_meta_model
from lora_kit.merging.checkpoint.shards import Shard, read_shards
from lora_kit.merging.merge_report import LogitCheck, MergeReport
from lora_kit.merging.plan_merge import plan_merge
from lora_kit.merging.planned_tensors import MergePlan, WeightedAdapter
from lora_kit.merging.verification import logits
from lora_kit.merging.verification import verify as proof
from lora_kit.merging.writing import journal, writer
from lora_kit.models.locate import find_base, find_local_folder
from lora_kit.targets.fingerprint import fingerprint
from lora_kit.targets.legacy_names import convert_to_model_names
from lora_kit.torch_utils import parse_float_dtype
from lora_kit.version import __version__

RECORD_FORMAT: Final = 2
"""Version of `lora_kit_merge.json`."""
MERGE_ALLOWANCES: Final = ("untie", "lost-delta")
"""What a merge may do beyond what an adapter may be: write tied parameters apart, lose most of a delta in rounding."""
VERIFICATIONS: Final = ("weights", "logits")

AdapterOrFolder = str | Path | Adapter


def merge(
    base: str | Path,
    adapter: AdapterOrFolder | Sequence[tuple[AdapterOrFolder, float]],
    out: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    replace: bool = False,
    allow: Collection[str] = (),
    verify: str = "weights",
    quantized: str | None = None,
    original: str | Path | None = None,
    progress: writer.BytesProgress | None = None,
) -> MergeReport:
    """Fold an adapter into its base, `W' = round(W + scaling · B A)`, and write the result as a model folder.

    One pass over the base's files: what no adapter changes is copied byte for byte, what one does is accumulated in
    fp32 a block of rows at a time and rounded once. The folder appears in one step, after what was written was read
    back and found to be base + adapter. Where anything fails, nothing is left.

    Args:
        base: hub id, local folder or `kit-base`.
        adapter: a folder, a name in the store, an id of the hub or an Adapter; or several, each with the weight it is
            added with.
        out: the folder to write, beside its inputs, never in them.
        dtype: of the floating weights of the result; None: each keeps its own.
        replace: an earlier merge in `out` may be replaced; anything else there never is.
        allow: `other-base` merges into another base than the one the adapter was made for; `untie` writes parameters
            apart that the base ties and the adapter does not change alike; `lost-delta` goes on where rounding eats
            most of a delta. And what `AdapterBank.load` allows.
        verify: `weights`: digests as read back from the disk, and numbers beside a second computation. `logits`: both
            models are loaded and compared as well.
        quantized: for a base that bitsandbytes quantised. `original`: into the model it was quantised from.
            `dequantized`: into what its weights stand for, written in the dtype they were quantised from.
            `requantized`: that, quantised again in the same way; most of a small delta does not survive it.
        original: the model that the base was quantised from: a folder or a hub id. That it is, is checked.
        progress: is given the bytes written so far and in all, again and again.

    Raises:
        MergeError: a quantised base with nothing chosen for it, tied weights, an adapter that is in this base already,
            an output inside an input, a delta that rounding would eat, a weight that is not finite.
        AdapterError, BaseMismatchError, BaseModelError: an input that cannot be read or does not fit, another original.
        StorageError: the output exists, or the disk refuses.
        VerificationError: what was written is not the base with the adapter.
        ConfigError: an argument that is none.

    Example:
        report = lk.merge("kit-base", "adapters/sql", "merged/sql", dtype="bfloat16")
        report.retention
    """
    started, out = time.perf_counter(), Path(out)
    _check_arguments(allow, verify)
    quantisation.check_quantized_choice(quantized, original=original, dtype=dtype, verify=verify)
    sources, wanted = _resolve_sources(adapter), None if dtype is None else parse_float_dtype(dtype)
    local = [folder for name in (base, original) if name is not None and (folder := find_local_folder(name))]
    beside = tuple(source for source, _ in sources if isinstance(source, Path))
    inputs = [*local, *beside]
    preflight.refuse_overlap(out, inputs)
    check_output(out, replace=replace, owned=preflight.is_merged_folder)
    parts = [_load_weighted_adapter(source, weight, allow=allow) for source, weight in sources]
    if verify == "logits":
        logits.check_logits_comparable(parts)
    folder = find_base(base)
    quantisation.check_quantized_base(folder, quantized)
    if original is not None:
        quantisation.check_original(folder, find_base(original), TaskHead.of(parts[0].adapter))
        base, folder = original, find_base(original)
    preflight.refuse_merged(folder, [part.adapter for part in parts])
    shards = read_shards(folder)
    if quantized in (quantisation.DEQUANTIZED, quantisation.REQUANTIZED):
        shards = quantisation.read_quantized_shards(folder, shards)
    needed = _estimate_bytes(shards, parts, wanted) - _measure_folder(journal.journal_folder_of(out))
    with stage_folder(out, replace=replace, owned=preflight.is_merged_folder, needed=needed) as staging:
        work = _MergeJob(str(base), folder, shards, parts, wanted, frozenset(allow), quantized, beside)
        report, origin, part = work.into(staging, out=out, progress=progress)
        if verify == "logits":
            report = dataclasses.replace(report, logits=work.compare_logits(staging, report, part))
        _write_record(staging, report, origin=origin, earlier=preflight.read_merged_digests(folder))
        size = _measure_folder(staging)
    return dataclasses.replace(report, out=out, bytes=size, seconds=time.perf_counter() - started)


@dataclass(frozen=True)
class _MergeJob:
    """Everything a merge needs, found to be there."""

    base: str
    folder: Path
    shards: tuple[Shard, ...]
    parts: list[WeightedAdapter]
    dtype: torch.dtype | None
    allow: frozenset[str]
    quantized: str | None
    beside: tuple[Path, ...]

    @property
    def head(self) -> TaskHead:
        heads = [TaskHead.of(part.adapter) for part in self.parts]
        if any(head != heads[0] for head in heads):
            raise MergeError("the adapters were made for different tasks or labels", hint="merge those of one task")
        return heads[0]

    def into(
        self, staging: Path, *, out: Path, progress: writer.BytesProgress | None
    ) -> tuple[MergeReport, dict[str, Any], WeightedAdapter]:
        """Write the merged model and check it.

        Returns:
            The report, the base's fingerprint, and the first adapter under the names of the base's modules.
        """
        head = self.head
        saved = {key: tensor for part in self.parts for key, tensor in part.adapter.saved().items()}
        base = build_meta_model(self.folder, self.shards, head, saved=saved)
        parts = [
            part._replace(adapter=convert_to_model_names(part.name, part.adapter, base.model)) for part in self.parts
        ]
        todo = plan_merge(
            base, self.shards, parts, head=head, dtype=self.dtype, allow=self.allow, quantized=self.quantized
        )
        changes = model_files.compute_config_changes(base, self.folder, head, untied=bool(todo.untied))
        gone = ["quantization_config"] if self.quantized == quantisation.DEQUANTIZED else []
        model_files.write_config(self.folder, staging, changes=changes, without=gone, dtype=self.dtype)
        model_files.copy_sidecars(self.folder, staging)
        for folder in self.beside if base.resized_embeddings else ():
            model_files.copy_tokenizer(folder, staging)
        with journal.keep_finished_files(out, self._key(todo)) as kept:
            written = writer.write_shards(todo, staging, kept=kept, progress=progress)
        report = MergeReport(
            out=staging,
            base=self.base,
            adapters={part.adapter.digest: part.weight for part in self.parts},
            dtype=_coarsest_dtype_of(todo),
            counts=todo.counts,
            tensors=tuple(written.retention),
            untied=todo.untied,
            left_out=todo.left_out,
            files=written.files,
            compared=0,
            quantized=self.quantized,
        )
        proof.check_retention(report.tensors, dtype=report.dtype, allow=self.allow)
        compared = proof.check_result(staging, base, self.shards, parts, head=head)
        return dataclasses.replace(report, compared=compared), fingerprint(base.model, name=self.base), parts[0]

    def _key(self, todo: MergePlan) -> str:
        """What the bytes of the weight files depend on."""
        files = [file.stat() for file in sorted(self.folder.iterdir()) if file.is_file()]
        facts = [
            __version__,
            [(file.st_size, file.st_mtime_ns) for file in files],
            [(part.adapter.digest, part.weight) for part in self.parts],
            [
                (shard.name, entry.name, str(entry.dtype), list(entry.source.shape), entry.how)
                for shard, entries in todo.shards
                for entry in entries
            ],
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def compare_logits(self, staging: Path, report: MergeReport, part: WeightedAdapter) -> LogitCheck:
        """Compare the logits of what was written with those of the base and its only adapter."""
        adapter = part.adapter
        return logits.check_logits(
            self.base,
            staging,
            part,
            head=self.head,
            paths=None
            if self.dtype
            else [
                *{path.removesuffix(".base_layer") for path in adapter.all_pairs()},
                *{key.rpartition(".")[0] for key in adapter.saved()},
                *adapter.tokens(),
            ],
            dtype=getattr(torch, report.dtype),
            allow=self.allow - set(MERGE_ALLOWANCES),
        )


def _write_record(folder: Path, report: MergeReport, *, origin: Mapping[str, Any], earlier: Sequence[str]) -> None:
    """The model card and, last, the record that says what this folder is."""
    (folder / model_files.CARD).write_bytes(report.page().encode())
    found = {key: value for key, value in report.to_json().items() if key not in ("out", "bytes", "seconds")}
    record = {**found, "format": RECORD_FORMAT, "base": origin, "merged": [*earlier, *report.adapters]}
    text = json.dumps(record, indent=2, sort_keys=True, allow_nan=False)
    (folder / preflight.MERGE_RECORD).write_bytes(f"{text}\n".encode())


def _check_arguments(allow: Collection[str], verify: str) -> None:
    known = (*ALLOWANCES, *MERGE_ALLOWANCES)
    unknown = [name for name in allow if name not in known]
    if isinstance(allow, str) or unknown:
        raise ConfigError(f"allow={allow!r} was given; expected any of {format_list(known)}")
    if verify not in VERIFICATIONS:
        raise ConfigError(f"verify={verify!r} was given; expected one of {format_list(VERIFICATIONS)}")


def _resolve_sources(
    adapter: AdapterOrFolder | Sequence[tuple[AdapterOrFolder, float]],
) -> list[tuple[Path | Adapter, float]]:
    """Return every adapter with its weight, the folders found."""
    return [
        (source if isinstance(source, Adapter) else resolve_folder(source), weight)
        for source, weight in _parse_sources(adapter)
    ]


def _parse_sources(
    adapter: AdapterOrFolder | Sequence[tuple[AdapterOrFolder, float]],
) -> list[tuple[AdapterOrFolder, float]]:
    """Every adapter with its weight."""
    if isinstance(adapter, (str, Path, Adapter)):
        return [(adapter, 1.0)]
    try:
        found = [(source, float(weight)) for source, weight in adapter]
    except (TypeError, ValueError):
        found = []
    sound = all(
        isinstance(source, (str, Path, Adapter)) and math.isfinite(weight) and weight for source, weight in found
    )
    if not found or not sound:
        raise ConfigError("an adapter, or a list of (adapter, weight) with finite weights that are not 0, was expected")
    return found


def _load_weighted_adapter(source: Path | Adapter, weight: float, *, allow: Collection[str]) -> WeightedAdapter:
    """An adapter, read."""
    allow = [name for name in allow if name in ALLOWANCES]
    adapter = source if isinstance(source, Adapter) else Adapter.load(source, allow=allow)
    name = adapter.digest[:12] if isinstance(source, Adapter) else label_adapter_folder(source)
    return WeightedAdapter(name, adapter, weight)


def _estimate_bytes(shards: Sequence[Shard], parts: Sequence[WeightedAdapter], dtype: torch.dtype | None) -> int:
    """Bytes of weights to be written, at the most."""
    tensors = [tensor for shard in shards for tensor in shard.tensors.values()]
    tensors += [tensor for part in parts for tensor in part.adapter.saved().values()]
    return sum(t.numel() * (dtype if dtype and t.is_floating_point() else t.dtype).itemsize for t in tensors)


def _coarsest_dtype_of(plan: MergePlan) -> str:
    """The coarsest of the tensors that an adapter changes: it decides how much they were rounded."""
    kinds = {
        entry.source.kind
        for entry in plan.entries
        if entry.how == "requantized" and isinstance(entry.source, QuantizedWeight)
    }
    if kinds:
        return format_list(sorted(kinds))
    dtypes = {entry.dtype for entry in plan.entries if entry.path and entry.dtype.is_floating_point}
    return str(max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)).removeprefix("torch.")


def _measure_folder(folder: Path) -> int:
    """Bytes of the files below a folder; 0 where there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
