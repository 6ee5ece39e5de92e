"""Several adapters and the base on one file, side by side, in one loaded model."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_kit.adapter.adapter import Adapter
from lora_kit.bank.bank import AdapterBank
from lora_kit.data.batches import Collator, EncodedDataset
from lora_kit.data.rows import Rows, read_rows
from lora_kit.errors import ConfigError, format_list
from lora_kit.evaluation.adapter_format import (
    EncodingSettings,
    check_format,
    encode_rows,
    labels_of_adapter,
    resolve_settings,
    task_for,
)
from lora_kit.evaluation.eval_report import Answer, EvalCase, EvalReport, Result, check_predictions_file
from lora_kit.evaluation.forward import ForwardResult, run_forward
from lora_kit.evaluation.generation_metrics import (
    EvalPrompt,
    GenerationTask,
    build_generation_task,
    collect_eval_prompts,
    generate_completions,
)
from lora_kit.evaluation.measure import compute_perplexity, true_labels_of
from lora_kit.evaluation.metrics import BASIC_METRICS, select_generation_metrics, validate_metrics
from lora_kit.evaluation.scores import score_labels, score_texts
from lora_kit.generation.adapter_args import AdapterSource, check_quantize, labels_of, read_adapter, task_of
from lora_kit.generation.decoding import Completion
from lora_kit.generation.generate import attach_adapters
from lora_kit.io.text import escape_text
from lora_kit.models.loading import Base, load_base, load_input_spec
from lora_kit.models.tasks import CAUSAL_LM, CLASSIFY, GENERATIVE_TASKS, LABEL_TASKS, TASKS
from lora_kit.names import DEFAULT_STORE

logger = logging.getLogger(__name__)

DEFAULT_METRICS: Final[Mapping[str, tuple[str, ...]]] = {
    task: (*BASIC_METRICS[task], *(("f1",) if task in LABEL_TASKS else ())) for task in TASKS
}
"""What is measured where nobody says: nothing that takes a generation."""

EvalProgress = Callable[[str, int, int], None]
"""Told the label of an adapter, how many of its rows are done, and how many there are."""


def evaluate(
    base: str | Base,
    adapters: Sequence[AdapterSource],
    data: str | Path | Rows,
    *,
    metrics: Sequence[str] | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    out: str | Path | None = None,
    replace: bool = False,
    store: str | Path = DEFAULT_STORE,
    quantize: str | None = None,
    allow: Collection[str] = (),
    on_progress: EvalProgress | None = None,
) -> EvalReport:
    """Measure adapters of one base, and the base itself, on the rows of a file.

    Each is given the rows as it saw those of its training: with the separator or the chat template of its record, its
    labels, its length. The base is given what the first adapter beside it is given. Rows with the same prompt are
    references of one another.

    Args:
        base: hub id, local folder, `kit-base`, or a loaded base; a loaded one is left as it was.
        adapters: folders, names in `store`, ids of the hub, Adapters; None for the base itself.
        data: a file of rows, see `lora_kit.data`, or rows.
        metrics: names from `METRICS`; None for those that need no generation.
        batch_size: rows at once.
        max_length: tokens of a sample at the most; None for what each adapter was trained with.
        max_new_tokens: tokens of an answer at the most; None for as many as the longest reference has, with its end.
        out: a file for what everyone said of each row, as JSONL.
        replace: that file may be replaced.
        store: where adapters are looked up by name.
        quantize: how to load the base, as in `load_base`.
        allow: as in `AdapterBank.load`.
        on_progress: called as rows are done.

    Raises:
        ConfigError: a metric that is unknown or does not fit, or a value out of range; nothing was loaded.
        UnknownAdapterError, AdapterError: an adapter that is not there, cannot be read, does not fit the base, or is of
            another task than its neighbours.
        DataError: rows that cannot be read, or that the adapters cannot be given.
        BaseModelError: the base cannot be found or read.
        StorageError: `out` exists, or cannot be written.

    Example:
        report = lk.evaluate("kit-base", [None, "adapters/sql"], "test.jsonl")
        report["sql"].metrics["loss"]
    """
    if not adapters:
        raise ConfigError("nothing to evaluate was given", hint="name an adapter, or None for the base itself")
    for name, value in (("batch_size", batch_size), ("max_length", max_length), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < (2 if name == "max_length" else 1):
            raise ConfigError(f"{name} must be a whole number from 1; {value!r} was given")
    read = [read_adapter(adapter, store=store, allow=allow) for adapter in adapters]
    labels = labels_of(adapters, read)
    values = dict(zip(labels, read, strict=True))
    rows = data if isinstance(data, Rows) else read_rows(data)
    wanted_task = _resolve_task(base, task_of(labels, read), rows)
    check_format(rows, wanted_task)
    wanted = validate_metrics(DEFAULT_METRICS[wanted_task] if metrics is None else metrics, wanted_task)
    questions = collect_eval_prompts(rows) if select_generation_metrics(wanted, wanted_task) else ()
    if out is not None:
        _check_out(Path(out), wanted, wanted_task, replace=replace)
    check_quantize(base, labels, read, quantize)
    loaded = _load_for_evaluation(base, values, wanted_task, quantize)
    plan = _build_eval_plan(
        loaded, values, rows, questions, wanted, max_length=max_length, max_new_tokens=max_new_tokens
    )
    started = time.perf_counter()
    with attach_adapters(loaded.model, values, allow=allow) as bank:
        found = _EvalRun(plan, bank, batch_size, on_progress).results(values)
    report = EvalReport(
        data=rows.path,
        task=wanted_task,
        rows=len(rows),
        cases=tuple(_build_cases(rows, questions)),
        results=tuple(found[label] for label in labels),
        seconds=time.perf_counter() - started,
    )
    if out is not None:
        report.save(out, replace=replace)
    return report


def _check_out(out: Path, metrics: Sequence[str], task: str, *, replace: bool) -> None:
    if task in GENERATIVE_TASKS and not select_generation_metrics(metrics, task):
        told = f"{escape_text(out)} is for what is said, and {format_list(metrics)} needs nothing to be said"
        raise ConfigError(told, hint="ask for exact_match too")
    check_predictions_file(out, replace=replace)


def _resolve_task(base: str | Base, of_adapters: str | None, rows: Rows) -> str:
    """What the adapters were made for; of a base alone, what it is and the rows are for."""
    own = base.task if isinstance(base, Base) else None
    if own and of_adapters and own != of_adapters:
        raise ConfigError(f"the adapters are for task {of_adapters}, the base given was loaded for {own}")
    if own or of_adapters or isinstance(base, Base):
        return own or str(of_adapters)
    task = task_for(rows)
    return load_input_spec(base).generative_task if task == CAUSAL_LM else task


def _load_for_evaluation(
    base: str | Base, values: Mapping[str, Adapter | None], task: str, quantize: str | None
) -> Base:
    if isinstance(base, Base):
        return base
    names = next((found for value in values.values() if value and (found := labels_of_adapter(value))), ())
    label2id = {name: number for number, name in enumerate(names)} if task in LABEL_TASKS else {}
    return load_base(base, task=task, label2id=label2id or None, quantize=quantize)


@dataclass(frozen=True)
class _EvalPlan:
    """Everything that is to be done, checked."""

    base: Base
    metrics: tuple[str, ...]
    settings: Mapping[str, EncodingSettings]
    samples: Mapping[str, EncodedDataset]
    exams: Mapping[str, GenerationTask]


def _build_eval_plan(
    base: Base,
    values: Mapping[str, Adapter | None],
    rows: Rows,
    questions: tuple[EvalPrompt, ...],
    metrics: tuple[str, ...],
    *,
    max_length: int | None,
    max_new_tokens: int | None,
) -> _EvalPlan:
    """Adapters that were trained in one way share their samples and their prompts."""
    found = resolve_settings(base, values, rows, max_length=max_length)
    each = dict.fromkeys(found.values())
    encoded: dict[EncodingSettings, EncodedDataset] = {}
    exams: dict[EncodingSettings, GenerationTask] = {}
    for setting in each:
        if set(metrics) - set(select_generation_metrics(metrics, base.task)):
            encoded[setting] = encode_rows(base, rows, setting)
        if questions:
            exams[setting] = build_generation_task(base, questions, setting.style, max_new_tokens=max_new_tokens)
    return _EvalPlan(
        base,
        metrics,
        found,
        {label: encoded[setting] for label, setting in found.items() if setting in encoded},
        {label: exams[setting] for label, setting in found.items() if setting in exams},
    )


class _EvalRun:
    """The work: first what takes a forward of each sample, adapter by adapter, then what is written, in one go."""

    def __init__(
        self, plan: _EvalPlan, bank: AdapterBank | None, batch_size: int, on_progress: EvalProgress | None
    ) -> None:
        self._plan, self._bank, self._batch_size, self._on_progress = plan, bank, batch_size, on_progress
        self._done: Counter[str] = Counter()
        self._collator = Collator(plan.base.pad_token_id, plan.base.decoder_inputs)

    def results(self, values: Mapping[str, Adapter | None]) -> dict[str, Result]:
        passes = {label: self._run_samples(label, each) for label, each in self._plan.samples.items()}
        written = generate_completions(
            self._plan.exams,
            bank=self._bank,
            batch_size=self._batch_size,
            on_rows=lambda label: self._told(label, 1),
        )
        return {
            label: self._build_result(label, value, passes.get(label), written.get(label, []))
            for label, value in values.items()
        }

    def _run_samples(self, label: str, each: EncodedDataset) -> ForwardResult:
        if self._bank is not None:
            self._bank.use(label if label in self._bank.names else None)
        return run_forward(
            self._plan.base.model,
            each,
            self._collator,
            batch_size=self._batch_size,
            on_rows=lambda count: self._told(label, count),
        )

    def _build_result(
        self, label: str, value: Adapter | None, passed: ForwardResult | None, written: list[Completion]
    ) -> Result:
        plan, names = self._plan, self._plan.settings[label].labels
        found: dict[str, float] = {}
        said: tuple[Answer, ...] = ()
        if passed is not None:
            found = {"loss": passed.loss, "perplexity": compute_perplexity(passed.loss)}
            if passed.predicted:
                others = [name for name in plan.metrics if name not in found]
                found |= score_labels(others, true_labels_of(plan.samples[label]), passed.predicted, labels=names)
                said = tuple(_name_labels(row, names, single=plan.base.task == CLASSIFY) for row in passed.predicted)
        if written:
            texts = [each.text for each in written]
            found |= score_texts(
                select_generation_metrics(plan.metrics, plan.base.task), texts, plan.exams[label].references
            )
            said = tuple(text.strip() for text in texts)
        unended = sum(not each.ended for each in written)
        scores = {name: found[name] for name in plan.metrics}
        logger.info("%s: %s", label, ", ".join(f"{name} {score:.4g}" for name, score in scores.items()))
        return Result(name=label, digest=value.digest if value else None, metrics=scores, said=said, unended=unended)

    def _told(self, label: str, count: int) -> None:
        self._done[label] += count
        if self._on_progress is not None:
            exams, samples_ = self._plan.exams, self._plan.samples
            total = (len(samples_[label]) if samples_ else 0) + (len(exams[label].rows) if exams else 0)
            self._on_progress(label, self._done[label], total)


def _name_labels(row: Sequence[int], names: Sequence[str], *, single: bool) -> Answer:
    return names[row[0]] if single else tuple(names[label] for label in row)


def _build_cases(rows: Rows, questions: Sequence[EvalPrompt]) -> list[EvalCase]:
    if questions:
        return [EvalCase(each.lines, each.prompt, each.references) for each in questions]
    if rows.format not in ("label", "words"):
        return []
    return [
        EvalCase((line,), value[0], str(value[1]) if rows.format == "label" else tuple(map(str, value[1])))
        for line, value in zip(rows.lines, rows.values, strict=True)
    ]
