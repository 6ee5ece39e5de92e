"""`merge`: a base's files and adapters become a model folder, all or nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_like import AdapterLike
from lora_kit.adapter.folder import ALLOWANCES
from lora_kit.adapter.use_record import find_common_use
from lora_kit.errors import ConfigError, MergeError, format_list
from lora_kit.io.atomic_write import check_output, stage_folder
from lora_kit.io.given_values import is_name_collection, parse_path
from lora_kit.io.output_overlap import refuse_overlap
from lora_kit.io.output_path import check_path
from lora_kit.io.portable_paths import make_folder_portable
from lora_kit.io.sealed_json import NO_DIGEST, SELF_DIGEST, seal_json
from lora_kit.io.text import escape_text, format_value
from lora_kit.merging import model_files, preflight, quantized_base
from lora_kit.merging.checkpoint.bnb_weights import QuantizedWeight
from lora_kit.merging.checkpoint.meta_model import MetaModel, TaskHead, build_meta_model
from lora_kit.merging.checkpoint.shards import Shard, read_shards
from lora_kit.merging.merge_report import LogitCheck, MergeReport
from lora_kit.merging.merge_sources import load_weighted_adapter, resolve_sources
from lora_kit.merging.plan_merge import plan_merge
from lora_kit.merging.planned_tensors import MergePlan, WeightedAdapter
from lora_kit.merging.verification import logits
from lora_kit.merging.verification import verify as proof
from lora_kit.merging.writing import journal, writer
from lora_kit.models.locate import find_base, find_local_folder, warn_of_floating_revision
from lora_kit.models.model_folder_card import infer_folder_task
from lora_kit.targets.fingerprint import fingerprint
from lora_kit.targets.legacy_names import convert_to_model_names
from lora_kit.torch_utils import parse_float_dtype, translate_out_of_memory
from lora_kit.version import __version__

RECORD_FORMAT: Final = 3
"""Version of `lora_kit_merge.json`."""
MERGE_ALLOWANCES: Final = ("untie", "lost-delta", "huge-delta")
"""Allowances of a merge besides those of loading: write tied parameters apart, lose most of a delta in rounding."""
VERIFICATIONS: Final = ("weights", "logits")


@translate_out_of_memory("memory ran out in the merge", hint="free some; the same merge goes on where it was")
def merge(
    base: str | Path,
    adapter: AdapterLike | Sequence[tuple[AdapterLike, float]],
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

    The base's files are read once: tensors that no adapter changes are copied byte for byte, the others are accumulated
    in fp32 by blocks of rows and rounded once. The result is read back and checked to be base + adapter before the
    folder appears, in one step. If anything fails, nothing is left.

    Args:
        base: hub id, local folder or `kit-base`.
        adapter: a folder, a name in the store, a hub id or an Adapter; or several, each with the weight of its update.
        out: the folder to write; it must not overlap an input.
        dtype: of the floating weights of the result; None: each keeps its own.
        replace: whether an earlier merge in `out` may be replaced; anything else there never is.
        allow: `other-base` merges into another base than the adapter's own; `untie` writes tied parameters apart where
            the adapter does not change both alike; `lost-delta` continues where rounding loses most of a delta, and
            `huge-delta` where one is above 10,000 times its weight. Also what `AdapterBank.load` allows.
        verify: `weights` checks the digests of the files read back from the disk, and values against a second
            computation; `logits` also loads both models and compares their logits.
        quantized: for a base that bitsandbytes quantized. `original` merges into the model it was quantized from;
            `dequantized` into its dequantized weights, written in the dtype they had before; `requantized` quantizes
            that result in the same way, which most of a small delta does not survive.
        original: folder or hub id of the model that the base was quantized from, which is checked.
        progress: is called with the bytes written so far and the bytes in all.

    Raises:
        MergeError: a quantized base without a choice, tied weights, an adapter that is in this base already, an output
            that overlaps an input, embeddings with fewer rows than the tokenizer has tokens, a delta that rounding
            would lose, or a weight that is not finite.
        AdapterError, BaseMismatchError, BaseModelError: an input cannot be read or does not match the others.
        StorageError: the output exists, or it cannot be written.
        VerificationError: what was written is not the base with the adapter.
        ConfigError: an argument is invalid.

    Example:
        lk.merge("kit-base", "adapters/sql", "merged/sql", dtype="bfloat16").retention
    """
    started, out, _ = time.perf_counter(), parse_path(out, name="out"), parse_path(base, name="base")
    check_path(out)
    _check_arguments(allow, verify)
    quantized_base.check_quantized_choice(quantized, original=original, dtype=dtype, verify=verify)
    sources, float_dtype = resolve_sources(adapter), None if dtype is None else parse_float_dtype(dtype)
    _check_output(out, sources, bases=(base, original), replace=replace)
    job = _open_job(base, original, sources, float_dtype, allow=allow, quantized=quantized, verify=verify)
    needed = job.estimate_bytes() - _measure_folder(journal.journal_folder_of(out))
    with stage_folder(out, replace=replace, owned=preflight.is_merged_folder, needed=needed) as staging:
        report = job.run(staging, out=out, verify=verify, progress=progress)
        size = _measure_folder(staging)
    return dataclasses.replace(report, out=out, bytes=size, seconds=time.perf_counter() - started)


def _check_output(
    out: Path,
    sources: Sequence[tuple[Path | Adapter, float]],
    *,
    bases: Sequence[str | Path | None],
    replace: bool,
) -> None:
    local = [folder for name in bases if name is not None and (folder := find_local_folder(name))]
    refuse_overlap(out, [*local, *_find_adapter_folders(sources)], error=MergeError)
    check_output(out, replace=replace, owned=preflight.is_merged_folder)


def _find_adapter_folders(sources: Sequence[tuple[Path | Adapter, float]]) -> tuple[Path, ...]:
    return tuple(source for source, _ in sources if isinstance(source, Path))


def _open_job(
    base: str | Path,
    original: str | Path | None,
    sources: Sequence[tuple[Path | Adapter, float]],
    dtype: torch.dtype | None,
    *,
    allow: Collection[str],
    quantized: str | None,
    verify: str,
) -> _MergeJob:
    """Load the adapters and the list of the base's tensors, and check that these can be merged as requested."""
    adapters = [load_weighted_adapter(source, weight, allow=allow) for source, weight in sources]
    if verify == "logits":
        logits.check_logits_comparable(adapters)
    folder = find_base(base)
    quantized_base.check_quantized_base(folder, quantized)
    if original is not None:
        quantized_base.check_original(folder, find_base(original), TaskHead.of(adapters[0].adapter))
        base, folder = original, find_base(original)
    warn_of_floating_revision(base)
    preflight.refuse_merged(folder, [weighted.adapter for weighted in adapters])
    shards = read_shards(folder)
    if quantized in (quantized_base.DEQUANTIZED, quantized_base.REQUANTIZED):
        shards = quantized_base.read_quantized_shards(folder, shards)
    adapter_folders = _find_adapter_folders(sources)
    return _MergeJob(str(base), folder, shards, adapters, dtype, frozenset(allow), quantized, adapter_folders)


@dataclass(frozen=True)
class _MergeJob:
    """The checked inputs of a merge.

    Attributes:
        base: as it was given.
        folder: of the base.
        shards: files of the base.
        adapters: to merge.
        dtype: of the floating weights of the result; None: each keeps its own.
        allow: as in `merge`.
        quantized: as in `merge`.
        adapter_folders: of the adapters that were given as folders.
    """

    base: str
    folder: Path
    shards: tuple[Shard, ...]
    adapters: list[WeightedAdapter]
    dtype: torch.dtype | None
    allow: frozenset[str]
    quantized: str | None
    adapter_folders: tuple[Path, ...]

    @property
    def head(self) -> TaskHead:
        """The head that all adapters were made for.

        Raises:
            MergeError: they were made for different ones.
        """
        heads = [TaskHead.of(weighted.adapter) for weighted in self.adapters]
        if any(head != heads[0] for head in heads):
            raise MergeError("the adapters were made for different tasks or labels", hint="merge those of one task")
        return heads[0]

    def estimate_bytes(self) -> int:
        """Return how many bytes of weights will be written, at most."""
        tensors = [tensor for shard in self.shards for tensor in shard.tensors.values()]
        tensors += [tensor for weighted in self.adapters for tensor in weighted.adapter.saved().values()]
        dtype = self.dtype
        return sum(t.numel() * (dtype if dtype and t.is_floating_point() else t.dtype).itemsize for t in tensors)

    def run(self, staging: Path, *, out: Path, verify: str, progress: writer.BytesProgress | None) -> MergeReport:
        """Write the merged model, check it, and write its record."""
        saved = {key: tensor for weighted in self.adapters for key, tensor in weighted.adapter.saved().items()}
        base = build_meta_model(self.folder, self.shards, self.head, saved=saved)
        adapters = [
            weighted._replace(adapter=convert_to_model_names(weighted.name, weighted.adapter, base.model))
            for weighted in self.adapters
        ]
        report = self._write_model(staging, base, adapters, out=out, progress=progress)
        if verify == "logits":
            report = dataclasses.replace(report, logits=self._compare_logits(staging, report, adapters[0]))
        base_fingerprint = fingerprint(base.model, name=self.base)
        card = report.page(infer_folder_task(staging), name=out.name)
        (staging / model_files.CARD).write_text(card, "utf-8")
        _write_record(staging, report, base=base_fingerprint, earlier=preflight.read_merged_digests(self.folder))
        return report

    def _write_model(
        self,
        staging: Path,
        base: MetaModel,
        adapters: Sequence[WeightedAdapter],
        *,
        out: Path,
        progress: writer.BytesProgress | None,
    ) -> MergeReport:
        """Write the merged model and check it.

        Args:
            base: the model without its weights.
            adapters: `self.adapters` under the names of the model's modules.
        """
        plan = plan_merge(
            base, self.shards, adapters, head=self.head, dtype=self.dtype, allow=self.allow, quantized=self.quantized
        )
        ends = self._write_sidecars(staging, base, untied=bool(plan.untied))
        before = self._identify_base_files()
        with journal.keep_finished_files(out, self._compute_key(plan)) as finished:
            written = writer.write_shards(plan, staging, finished=finished, progress=progress)
            if self._identify_base_files() != before:
                raise MergeError(f"{escape_text(self.base)} was changed while it was read", hint="merge again")
        dtype, retention = _coarsest_dtype_of(plan), tuple(written.retention)
        proof.check_retention(retention, dtype=dtype, allow=self.allow)
        return MergeReport(
            out=staging,
            base=self.base,
            adapters={weighted.adapter.digest: weighted.weight for weighted in self.adapters},
            dtype=dtype,
            counts=plan.counts,
            tensors=retention,
            untied=plan.untied,
            left_out=plan.left_out,
            files=written.files,
            compared=proof.check_result(staging, base, self.shards, adapters, head=self.head),
            quantized=self.quantized,
            ends=ends,
        )

    def _write_sidecars(self, staging: Path, base: MetaModel, *, untied: bool) -> tuple[str, ...]:
        """Write the config, and copy the other files that belong to the model. Returns what `write_use` does."""
        changes = model_files.compute_config_changes(base, self.folder, self.head, untied=untied)
        gone = ["quantization_config"] if self.quantized == quantized_base.DEQUANTIZED else []
        model_files.write_config(self.folder, staging, changes=changes, without=gone, dtype=self.dtype)
        model_files.copy_sidecars(self.folder, staging)
        if base.resized_embeddings:
            for folder in self.adapter_folders:
                model_files.copy_tokenizer(folder, staging)
            model_files.check_vocabulary(staging, base.config.get_text_config().vocab_size)
        return model_files.write_use(staging, find_common_use([weighted.adapter.record for weighted in self.adapters]))

    def _compute_key(self, plan: MergePlan) -> str:
        """Return a digest of what the bytes of the weight files depend on."""
        facts = [
            __version__,
            self._identify_base_files(),
            [(weighted.adapter.digest, weighted.weight) for weighted in self.adapters],
            [
                (shard.name, entry.name, str(entry.dtype), list(entry.source.shape), entry.how)
                for shard, entries in plan.shards
                for entry in entries
            ],
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _identify_base_files(self) -> list[tuple[str, int, int, int, int]]:
        """Return what changes with a file of the base, also where a copy keeps size and time: name, inode, ctime."""
        files = [(file.name, file.stat()) for file in sorted(self.folder.iterdir()) if file.is_file()]
        return [(name, one.st_size, one.st_mtime_ns, one.st_ino, one.st_ctime_ns) for name, one in files]

    def _compare_logits(self, staging: Path, report: MergeReport, weighted: WeightedAdapter) -> LogitCheck:
        """Compare the logits of the written model with those of base + adapter."""
        adapter = weighted.adapter
        changed = {path.removesuffix(".base_layer") for path in adapter.all_pairs()}
        changed |= {key.rpartition(".")[0] for key in adapter.saved()} | adapter.tokens().keys()
        return logits.check_logits(
            self.base,
            staging,
            weighted,
            head=self.head,
            paths=None if self.dtype else changed,
            dtype=getattr(torch, report.dtype),
            allow=self.allow - set(MERGE_ALLOWANCES),
        )


def _write_record(folder: Path, report: MergeReport, *, base: Mapping[str, object], earlier: Sequence[str]) -> None:
    """Write the record that marks a folder as a finished merge."""
    fields = {key: value for key, value in report.to_json().items() if key not in ("out", "bytes", "seconds")}
    base = {**base, "name": make_folder_portable(str(base["name"]))}
    record = {
        **fields,
        SELF_DIGEST: NO_DIGEST,
        "format": RECORD_FORMAT,
        "base": base,
        "merged": [*earlier, *report.adapters],
    }
    text = json.dumps(record, indent=2, sort_keys=True, allow_nan=False)
    (folder / preflight.MERGE_RECORD).write_bytes(seal_json(f"{text}\n").encode())


def _check_arguments(allow: Collection[str], verify: str) -> None:
    known = (*ALLOWANCES, *MERGE_ALLOWANCES)
    if not is_name_collection(allow) or any(name not in known for name in allow):
        raise ConfigError(f"allow={format_value(allow)} was given; expected any of {format_list(known)}")
    if verify not in VERIFICATIONS:
        raise ConfigError(f"verify={verify!r} was given; expected one of {format_list(VERIFICATIONS)}")


def _coarsest_dtype_of(plan: MergePlan) -> str:
    """Return the coarsest dtype, or quantized kinds, of the tensors that an adapter changes."""
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
    """Return the bytes of the files below a folder; 0 where there is no folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
