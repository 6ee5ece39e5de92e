"""`evaluate`: several adapters and the base on one file, side by side, in one loaded model."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_like import AdapterLike
from lora_kit.bank.bank import AdapterBank
from lora_kit.data.batches import Collator, EncodedDataset
from lora_kit.data.encode import encode_rows
from lora_kit.data.mixture import has_text_pairs
from lora_kit.data.rows import Rows, read_rows
from lora_kit.data.sample_format import SampleFormat, convert_rows
from lora_kit.errors import ConfigError, format_list
from lora_kit.evaluation.adapter_format import (
    check_format,
    find_learn,
    find_task,
    find_thresholds,
    resolve_eval_problem,
    resolve_sample_formats,
)
from lora_kit.evaluation.eval_cases import build_cases
from lora_kit.evaluation.eval_page import check_page_file, save_eval_files
from lora_kit.evaluation.eval_report import Answer, EvalReport, Result
from lora_kit.evaluation.forward import ForwardResult, run_forward
from lora_kit.evaluation.generation_metrics import (
    EvalPrompt,
    GenerationTask,
    build_generation_task,
    collect_eval_prompts,
    generate_completions,
)
from lora_kit.evaluation.label_answers import name_answers
from lora_kit.evaluation.label_base import load_for_labels
from lora_kit.evaluation.measure import compute_perplexity
from lora_kit.evaluation.metrics import default_metrics, select_generation_metrics, validate_metrics
from lora_kit.evaluation.outcomes import measure_misses
from lora_kit.evaluation.sample_scores import score_samples
from lora_kit.evaluation.scores import score_texts
from lora_kit.generation.adapter_args import build_adapter_labels, find_common_task, list_input_folders, read_adapter
from lora_kit.generation.decoding import Completion
from lora_kit.generation.generate import attach_adapters
from lora_kit.io.output_file import check_output_file
from lora_kit.io.output_overlap import reason_overlap
from lora_kit.io.text import escape_text
from lora_kit.models.loading import Base, load_input_spec
from lora_kit.models.tasks import CAUSAL_LM, CLASSIFY, GENERATIVE_TASKS, LABEL_TASKS, NEXT
from lora_kit.names import DEFAULT_STORE

logger = logging.getLogger(__name__)

EvalProgress = Callable[[str, int, int], None]
"""Called with the label of an adapter, how many of its rows are done, and how many there are."""


def evaluate(
    base: str | Base,
    adapters: Sequence[AdapterLike | None],
    data: str | Path | Rows,
    *,
    metrics: Sequence[str] | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    out: str | Path | None = None,
    report: str | Path | None = None,
    replace: bool = False,
    store: str | Path = DEFAULT_STORE,
    quantize: str | None = None,
    allow: Collection[str] = (),
    on_progress: EvalProgress | None = None,
) -> EvalReport:
    """Measure adapters of one base, and the base itself, on the rows of a file.

    Each adapter gets the rows as in its training: with the separator or chat template, the labels and the length of its
    record; the base gets what the first adapter gets. Rows with the same prompt are references of one another.

    Args:
        base: hub id, local folder, `kit-base`, or a loaded base; a loaded one is left as it was.
        adapters: folders, names in `store`, hub ids, Adapters; None for the base itself.
        data: a file of rows, see `lora_kit.data`, or rows.
        metrics: names from `METRICS`; None for those that need no generation.
        batch_size: rows in one batch.
        max_length: most tokens of a sample; None for what each adapter was trained with.
        max_new_tokens: most tokens of an answer; None for as many as the longest reference has, with its end.
        out, report: files for the answers to each row, .jsonl, and for a page, .html; `replace`: they may be replaced.
        store: where adapters are looked up by name.
        quantize: how to load the base, as in `load_base`.
        allow: as in `AdapterBank.load`.
        on_progress: called as rows are done.

    Raises:
        ConfigError: a metric is unknown or does not fit the task, or a value is out of range; nothing was loaded.
        UnknownAdapterError, AdapterError: an adapter does not exist, cannot be read, or does not match the others.
        DataError: the rows cannot be read, or are not of a format that the adapters take.
        BaseModelError, StorageError: the base cannot be found or read; `out` exists, or cannot be written.

    Example:
        lk.evaluate("kit-base", [None, "adapters/sql"], "test.jsonl")["sql"].metrics["loss"]
    """
    _check_counts(batch_size=batch_size, max_length=max_length, max_new_tokens=max_new_tokens)
    labels, by_label = _read_adapters(adapters, store, allow)
    rows = data if isinstance(data, Rows) else read_rows(data)
    task = _resolve_task(base, by_label, rows)
    problem = resolve_eval_problem(base, by_label, rows) if task == CLASSIFY else None
    names = validate_metrics(default_metrics(task, problem) if metrics is None else metrics, task, problem)
    prompts = _collect_prompts(rows, by_label) if select_generation_metrics(names, task) else ()
    read = [rows.path, *list_input_folders(base, by_label.values(), store=store)]
    _check_outputs(out, report, names, task, replace=replace, inputs=read)
    loaded = load_for_labels(base, by_label, task, quantize, problem=problem)
    formats = resolve_sample_formats(loaded, by_label, rows, max_length=max_length, problem=problem)
    plan = _build_eval_plan(loaded, by_label, formats, rows, prompts, names, max_new_tokens)
    measured = _run_plan(plan, labels, batch_size, on_progress, allow=allow)
    save_eval_files(measured, out, report, base=loaded.name, replace=replace)
    return measured


def _collect_prompts(rows: Rows, adapters: Mapping[str, Adapter | None]) -> tuple[EvalPrompt, ...]:
    return collect_eval_prompts(rows, learn=find_learn(adapters))


def _read_adapters(
    sources: Sequence[AdapterLike | None], store: str | Path, allow: Collection[str]
) -> tuple[list[str], dict[str, Adapter | None]]:
    """Return the label of each source, and the adapters by label: a source that is given twice is measured once."""
    if not sources:
        raise ConfigError("nothing to evaluate was given", hint="name an adapter, or None for the base itself")
    adapters = [read_adapter(source, store=store, allow=allow) for source in sources]
    labels = build_adapter_labels(sources, adapters)
    return labels, dict(zip(labels, adapters, strict=True))


def _check_counts(*, batch_size: int, max_length: int | None, max_new_tokens: int | None) -> None:
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("max_length", max_length, 2),
        ("max_new_tokens", max_new_tokens, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name} must be a whole number from {least}; {value!r} was given")


def _check_outputs(
    out: str | Path | None,
    report: str | Path | None,
    metrics: Sequence[str],
    task: str,
    *,
    replace: bool,
    inputs: Sequence[str | Path],
) -> None:
    if report is not None:
        check_page_file(Path(report), replace=replace, inputs=inputs)
    if out is None:
        return
    out = Path(out)
    if report is not None and reason_overlap(out, [report]):
        raise ConfigError(f"out and report are one file, {escape_text(out)}", hint="name two files")
    if task in GENERATIVE_TASKS and not select_generation_metrics(metrics, task):
        message = f"{escape_text(out)} is for generated texts, and {format_list(metrics)} needs none"
        raise ConfigError(message, hint="ask for exact_match too")
    check_output_file(out, replace=replace, inputs=inputs)


def _resolve_task(base: str | Base, adapters: Mapping[str, Adapter | None], rows: Rows) -> str:
    """Return the task of a loaded base or of the adapters; without either, the task that the rows are for."""
    task = find_common_task(list(adapters), list(adapters.values()))
    if isinstance(base, Base):
        if task not in (None, base.task):
            raise ConfigError(f"the adapters are for task {task}, the base given was loaded for {base.task}")
        task = base.task
    elif task is None:
        task = find_task(rows)
        task = load_input_spec(base).generative_task if task == CAUSAL_LM else task
    check_format(rows, task)
    return task


@dataclass(frozen=True)
class _EvalPlan:
    """Everything that is to be measured, checked.

    Attributes:
        base: the loaded base.
        adapters: the adapters by label; None for the base itself.
        rows: the rows.
        prompts: the prompts of the rows; empty if no metric needs them.
        metrics: the names of the metrics.
        formats: the sample format of each adapter, by its label.
        samples: the samples of each adapter, by its label; empty if no metric needs them.
        tasks: the prompts of each adapter, by its label; empty if no metric needs them.
    """

    base: Base
    adapters: Mapping[str, Adapter | None]
    rows: Rows
    prompts: Sequence[EvalPrompt]
    metrics: tuple[str, ...]
    formats: Mapping[str, SampleFormat]
    samples: Mapping[str, EncodedDataset]
    tasks: Mapping[str, GenerationTask]


def _build_eval_plan(
    base: Base,
    adapters: Mapping[str, Adapter | None],
    formats: Mapping[str, SampleFormat],
    rows: Rows,
    prompts: Sequence[EvalPrompt],
    metrics: tuple[str, ...],
    max_new_tokens: int | None,
) -> _EvalPlan:
    """Encode the rows once for each sample format: adapters that share one share their samples and prompts."""
    needs_samples = bool(set(metrics) - set(select_generation_metrics(metrics, base.task)))
    samples: dict[SampleFormat, EncodedDataset] = {}
    tasks: dict[SampleFormat, GenerationTask] = {}
    for each in dict.fromkeys(formats.values()):
        if needs_samples:
            samples[each] = encode_rows(convert_rows(rows, each.style), base.tokenizer, each)
        if prompts:
            tasks[each] = build_generation_task(base, prompts, each.style, max_new_tokens=max_new_tokens)
    return _EvalPlan(
        base,
        adapters,
        rows,
        prompts,
        metrics,
        formats,
        {label: samples[each] for label, each in formats.items() if each in samples},
        {label: tasks[each] for label, each in formats.items() if each in tasks},
    )


def _run_plan(
    plan: _EvalPlan,
    labels: Sequence[str],
    batch_size: int,
    on_progress: EvalProgress | None,
    *,
    allow: Collection[str],
) -> EvalReport:
    started = time.perf_counter()
    with attach_adapters(plan.base.model, plan.adapters, allow=allow) as bank:
        results = _EvalRun(plan, bank, batch_size, on_progress).run()
    return EvalReport(
        data=plan.rows.path,
        task=plan.base.task,
        rows=len(plan.rows),
        cases=tuple(build_cases(plan.rows, plan.prompts)),
        results=tuple(results[label] for label in labels),
        kind=next((samples.kind for samples in plan.samples.values()), NEXT),
        labels=next(iter(plan.formats.values())).labels,
        text_pairs=has_text_pairs(plan.rows),
        seconds=time.perf_counter() - started,
    )


class _EvalRun:
    """Runs a plan: first the forwards, adapter by adapter, then the generation for all adapters together."""

    def __init__(
        self, plan: _EvalPlan, bank: AdapterBank | None, batch_size: int, on_progress: EvalProgress | None
    ) -> None:
        self._plan, self._bank, self._batch_size, self._on_progress = plan, bank, batch_size, on_progress
        self._done: Counter[str] = Counter()
        self._collator = Collator(plan.base.pad_token_id, plan.base.decoder_inputs, plan.base.takes_token_types)

    def run(self) -> dict[str, Result]:
        """Return the result of each adapter, by its label."""
        forwards = {label: self._run_samples(label, samples) for label, samples in self._plan.samples.items()}
        completions = generate_completions(
            self._plan.tasks,
            bank=self._bank,
            batch_size=self._batch_size,
            on_rows=lambda label: self._report_progress(label, 1),
        )
        return {
            label: self._build_result(label, adapter, forwards.get(label), completions.get(label, []))
            for label, adapter in self._plan.adapters.items()
        }

    def _run_samples(self, label: str, samples: EncodedDataset) -> ForwardResult:
        if self._bank is not None:
            self._bank.use(label if label in self._bank.names else None)
        return run_forward(
            self._plan.base.model,
            samples,
            self._collator,
            batch_size=self._batch_size,
            thresholds=self._find_thresholds(label),
            on_rows=lambda count: self._report_progress(label, count),
        )

    def _find_thresholds(self, label: str) -> tuple[float, ...]:
        """Return the thresholds of an adapter; of a base its own only where it is alone: beside others they compare."""
        plan, adapter = self._plan, self._plan.adapters[label]
        if adapter is None and len(plan.adapters) > 1:
            return ()
        return find_thresholds((adapter or plan.base).record, plan.formats[label].labels)

    def _build_result(
        self, label: str, adapter: Adapter | None, forward: ForwardResult | None, completions: Sequence[Completion]
    ) -> Result:
        plan = self._plan
        values: dict[str, float] = {}
        answers: tuple[Answer, ...] = ()
        misses: tuple[float, ...] = ()
        if forward is not None:
            values = {"loss": forward.loss, "perplexity": compute_perplexity(forward.loss)}
        if forward is not None and plan.base.task in LABEL_TASKS:
            names, samples = plan.formats[label].labels, plan.samples[label]
            wanted = [name for name in plan.metrics if name not in values]
            values |= score_samples(wanted, samples, forward, labels=names)
            answers = name_answers(samples.kind, forward, names)
            misses = measure_misses(samples, forward, self._find_thresholds(label))
        if completions:
            texts = [completion.text for completion in completions]
            wanted = list(select_generation_metrics(plan.metrics, plan.base.task))
            values |= score_texts(wanted, texts, plan.tasks[label].references)
            answers = tuple(text.strip() for text in texts)
        # A metric with a value for each label stands for the names of these values.
        names_of_labels = [name for name in values if name.startswith("f1[")]
        scores = {name: values[name] for name in (*plan.metrics, *names_of_labels) if name in values}
        logger.info("%s: %s", label, ", ".join(f"{name} {score:.4g}" for name, score in scores.items()))
        return Result(
            name=label,
            digest=adapter.digest if adapter else None,
            metrics=scores,
            said=answers,
            misses=misses,
            unended=sum(not completion.ended for completion in completions),
        )

    def _report_progress(self, label: str, count: int) -> None:
        self._done[label] += count
        if self._on_progress is not None:
            samples, task = self._plan.samples.get(label), self._plan.tasks.get(label)
            total = (0 if samples is None else len(samples)) + (0 if task is None else len(task.rows))
            self._on_progress(label, self._done[label], total)
