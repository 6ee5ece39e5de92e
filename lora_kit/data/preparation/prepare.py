"""`prepare`: from a file as people have it to rows that can be trained on: examined, cleaned on request, and split.

The same file and the same settings give the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_kit.data.encodings import AUTO_ENCODING
from lora_kit.data.layouts import FORMATS
from lora_kit.data.messages import ALL, LEARN
from lora_kit.data.preferences import get_answer_format, is_preference
from lora_kit.data.preparation.examine import ExaminedFile, ReadOptions, examine, find_leaks
from lora_kit.data.preparation.labels import AUTO
from lora_kit.data.preparation.prepared_folder import Preparation, PreparedFile, is_prepared, write_preparation
from lora_kit.data.preparation.reward_options import check_has_rewards, describe_answers, leave_room_for_answers
from lora_kit.data.preparation.split import choose_share, split
from lora_kit.data.prompt_rows import PROMPT_FORMATS
from lora_kit.data.records import BAD, EMPTY, LONG, NOT_UTF8
from lora_kit.data.rows import Rows, build_fault_error
from lora_kit.data.sample_format import DEFAULT_MAX_LENGTH, SampleFormat
from lora_kit.data.templates import PLAIN, chat_template, find_chat_template
from lora_kit.errors import DataError, format_list, suggest_nearest
from lora_kit.io.atomic_write import check_output
from lora_kit.models.loading import InputSpec, load_input_spec
from lora_kit.models.tasks import CAUSAL_LM, PROBLEMS
from lora_kit.names import KIT_BASE

DUPLICATES, CONFLICTS, LEAKS, RARE = "duplicates", "conflicts", "leaks", "rare"
DROPPABLE: Final = (BAD, EMPTY, LONG, DUPLICATES, CONFLICTS, LEAKS, RARE)
"""Rows that can be left out: invalid, without text, too long; repeats; validated on, too; with a rare label."""


def prepare(
    source: str | Path,
    out: str | Path | None = None,
    *,
    validation: str | Path | None = None,
    share: float | None = None,
    test: float = 0.0,
    base: str = KIT_BASE,
    max_length: int | None = None,
    template: str | None = None,
    template_variables: Mapping[str, object] | None = None,
    learn: str = ALL,
    rename: Mapping[str, str] | None = None,
    relabel: Mapping[str, str] | str | None = None,
    problem: str | None = None,
    rewards: Sequence[str] = (),
    encoding: str = AUTO_ENCODING,
    drop: Collection[str] = (),
    seed: int = 0,
    replace: bool = False,
) -> Preparation:
    """Examine a file of rows, clean it as requested, and write it split for training, all or nothing.

    Args:
        source: the file or data set; see `lora_kit.data.readers`, `lora_kit.data.hub_datasets` for names of data sets,
            and `lora_kit.data.layouts`.
        out: the folder to write; None to examine only.
        validation: a separate file for validation; None to set a share of the rows aside.
        share: of the rows to set aside for validation, None for what `choose_share` says; `test`: for a test.
        base: the base whose tokens are counted, and which the recipe trains on.
        max_length: most tokens of a sample; None for the context of the base, but at most 2,048.
        template: of conversations: `plain`, a Jinja file or its text; None for the tokenizer's own, else `plain`.
        template_variables: what the template is given besides; `learn`: which answers are learned, of `LEARN`.
        rename: new names of columns by old name; `relabel`: of labels, or `auto` for one slip, case, blanks, umlauts.
        problem: what is predicted of texts with labels, one of `PROBLEMS`; None to infer it from them.
        rewards: functions for the objective `grpo`: `rewards.py:has_answer`; rows then are prompts with any columns.
        encoding: encoding of the files; `auto` to find it out, see `lora_kit.data.encodings`.
        drop: which rows to leave out, of `DROPPABLE`; the first of several duplicates stays.
        seed: seed of the split; `replace`: whether `out` may be replaced.

    Raises:
        DataError: the files cannot be read, or rows that cannot be trained on are neither fixed nor left out.
        BaseModelError: the base's tokenizer cannot be read.
        StorageError: `out` exists, has a file in it that is read, or cannot be written.
    """
    _check_arguments(drop, relabel, problem, learn, (share or 0.0, test))
    folder = None if out is None else Path(out)
    if folder is not None:
        check_output(folder, replace=replace, owned=is_prepared, inputs=filter(None, (source, validation, template)))
    chat = _ChatChoices(template, dict(template_variables or {}), learn, tuple(rewards))
    options = _build_options(base, max_length, chat, problem, rename=rename, relabel=relabel, encoding=encoding)
    parts = _prepare_files(Path(source), None if validation is None else Path(validation), options, drop)
    _check_is_chat(parts[0], chat)
    if folder is not None:
        _refuse_remaining_faults(parts, options)
    share = _resolve_share(share, parts)
    splits = _split_rows(parts, share=share, test=test, seed=seed)
    choices = {"drop": sorted(drop), "share": share, "test": test, "seed": seed}
    preparation = _build_preparation(parts, splits, options, choices)
    return preparation if folder is None else write_preparation(preparation, folder, replace=replace)


@dataclass(frozen=True)
class _ChatChoices:
    """How conversations are rendered, and which answers are learned.

    Attributes:
        template: as in `prepare`.
        variables: what the template is given besides.
        learn: one of `LEARN`.
        rewards: functions that reward answers of the model's own.
    """

    template: str | None
    variables: Mapping[str, object]
    learn: str
    rewards: tuple[str, ...]


def _check_is_chat(part: PreparedFile, chat: _ChatChoices) -> None:
    """Raise DataError for options of conversations where the rows are of another format."""
    kind = part.examined.rows.format
    given = {"a chat template": chat.template, "template_variables": chat.variables, "learn": chat.learn != ALL}
    name = next((name for name, value in given.items() if value), None)
    if name and get_answer_format(kind) != "chat":
        what = f"{name} was given, which is for conversations, and {part.path} has rows of the format {kind}"
        raise DataError(what, hint="leave it out")


def _check_arguments(
    drop: Collection[str],
    relabel: Mapping[str, str] | str | None,
    problem: str | None,
    learn: str,
    shares: tuple[float, float],
) -> None:
    if isinstance(relabel, str) and relabel != AUTO:
        raise DataError(f"relabel {relabel!r} is not known", hint=f"{AUTO}, or old=new")
    unknown = sorted(set(drop) - set(DROPPABLE))
    if unknown:
        hint = suggest_nearest(unknown[0], DROPPABLE) or f"known: {format_list(DROPPABLE)}"
        raise DataError(f"drop {format_list(unknown)} is not known", hint=hint)
    if learn not in LEARN:
        hint = suggest_nearest(learn, LEARN) or f"known: {format_list(LEARN)}"
        raise DataError(f"learn {learn!r} is not known", hint=hint)
    if problem is not None and problem not in PROBLEMS:
        hint = suggest_nearest(problem, PROBLEMS) or f"known: {format_list(PROBLEMS)}"
        raise DataError(f"problem {problem!r} is not known", hint=hint)
    _check_shares(*shares)


def _check_shares(share: float, test: float) -> None:
    for purpose, value in (("validation", share), ("test", test)):
        if not 0 <= value < 1:
            raise DataError(f"the share for {purpose} must be at least 0 and below 1; {value} was given")
    if share + test >= 1:
        raise DataError(f"the shares for validation and test are {share} and {test}, which leaves no row to train on")


def _build_options(
    base: str,
    max_length: int | None,
    chat: _ChatChoices,
    problem: str | None,
    *,
    rename: Mapping[str, str] | None,
    relabel: Mapping[str, str] | str | None,
    encoding: str,
) -> ReadOptions:
    spec = load_input_spec(base)
    name = chat.template if chat.template is not None or find_chat_template(spec.tokenizer) else PLAIN
    options = ReadOptions(
        base=base,
        tokenizer=spec.tokenizer,
        hidden_size=spec.hidden_size,
        chat_template=name,
        sample_format=SampleFormat(
            max_length=_resolve_max_length(max_length, spec, base),
            template=chat_template(name, spec.tokenizer, base=base, variables=chat.variables),
            learn=chat.learn,
            task=spec.generative_task,
        ),
        rename=dict(rename or {}),
        relabel=relabel if isinstance(relabel, str) else dict(relabel or {}),
        encoding=encoding,
        problem=problem,
    )
    return leave_room_for_answers(options, chat.rewards)


def _resolve_max_length(max_length: int | None, spec: InputSpec, base: str) -> int:
    length = max_length or min(spec.max_length, DEFAULT_MAX_LENGTH)
    if not 2 <= length <= spec.max_length:
        message = f"max_length is {length}; it must be at least 2, and {base} sees {spec.max_length} tokens at once"
        raise DataError(message)
    return length


# Reading and cleaning


def _prepare_files(
    source: Path, validation: Path | None, options: ReadOptions, drop: Collection[str]
) -> tuple[PreparedFile, ...]:
    train = examine(source, options)
    if not len(train.rows):
        raise build_fault_error(source, train.faults)
    _refuse_other_encoding(source, train, drop)
    rare = tuple(train.rare_labels)
    if validation is None:
        return (_clean_file(source, train, {}, drop, rare),)
    label2id = {name: number for number, name in enumerate(train.labels)} if train.labels else None
    options = dataclasses.replace(options, problem=train.problem)
    other = examine(validation, options, label2id=label2id, split="validation")
    _refuse_other_encoding(validation, other, drop)
    if other.rows.format != train.rows.format:
        kinds = f"{source} has rows of the format {train.rows.format}, {validation} of the format {other.rows.format}"
        raise DataError(kinds, hint="both files have one format")
    leaks = find_leaks(train.rows, other.rows)
    return _clean_file(source, train, leaks, drop, rare), _clean_file(validation, other, {}, drop, rare)


def _refuse_other_encoding(path: Path, examined: ExaminedFile, drop: Collection[str]) -> None:
    """Raise DataError if rows are not UTF-8: the file is more likely in another encoding than full of bad rows."""
    faults = [fault for fault in examined.faults if fault.what.startswith(NOT_UTF8)]
    if faults and BAD not in drop:
        raise build_fault_error(path, faults, hint=f"to leave these rows out: --drop {BAD}")


def _clean_file(
    path: Path, examined: ExaminedFile, leaks: Mapping[int, int], drop: Collection[str], rare: Collection[str]
) -> PreparedFile:
    """Leave out the rows of the kinds to drop; `rare` are the labels that too few rows to train on have."""
    droppable = {
        **{kind: examined.lines_of(kind) for kind in (BAD, EMPTY, LONG)},
        DUPLICATES: list(examined.duplicates),
        # Nobody knows which of the labels is right, so all rows with the input go.
        CONFLICTS: sorted({*examined.conflicts, *examined.conflicts.values()}),
        LEAKS: list(leaks),
        RARE: examined.find_lines_of_labels(rare),
    }
    dropped = {kind: lines for kind, lines in droppable.items() if kind in drop and lines}
    gone = {line for lines in dropped.values() for line in lines}
    kept = [index for index, line in enumerate(examined.rows.lines) if line not in gone]
    return PreparedFile(path=path, examined=examined, leaks=leaks, dropped=dropped, kept=kept)


def _refuse_remaining_faults(parts: Sequence[PreparedFile], options: ReadOptions) -> None:
    """Raise DataError if faults are not left out, or answers not rewarded: the rows could not be trained on."""
    check_has_rewards(parts[0], options.rewards)
    for part in parts:
        faults = [fault for fault in part.examined.faults if fault.kind not in part.dropped]
        if faults:
            kinds = [kind for kind in DROPPABLE if any(fault.kind == kind for fault in faults)]
            hint = f"fix these rows, or leave them out: --drop {' '.join(kinds)}"
            raise build_fault_error(part.path, faults, hint=hint)


def _resolve_share(share: float | None, parts: Sequence[PreparedFile]) -> float:
    """Return the share of rows to set aside for validation: none where there is a file for it."""
    if len(parts) > 1:
        return 0.0
    return choose_share(len(parts[0].kept)) if share is None else share


def _split_rows(parts: Sequence[PreparedFile], *, share: float, test: float, seed: int) -> dict[str, Rows | None]:
    """Return the rows of each side; those of the test first, so that they do not depend on the others' share."""
    kept = [part.examined.rows.only(part.kept) for part in parts]
    for part, rows in zip(parts, kept, strict=True):
        if not len(rows):
            raise _build_nothing_left_error(part)
    rest, tested = _set_aside(kept[0], test, seed, parts[0].examined.problem)
    train, validated = _set_aside(rest, share * len(kept[0]) / len(rest), seed, parts[0].examined.problem)
    return {"train": train, "validation": kept[1] if len(kept) > 1 else validated, "test": tested}


def _build_nothing_left_error(part: PreparedFile) -> DataError:
    """Return the error for a file of which every row is left out, with what was wrong with the first one."""
    counts = format_list([f"{len(lines):,} {kind}" for kind, lines in part.dropped.items()])
    first = next((f"line {fault.line}: {fault.what}" for fault in part.examined.faults), "")
    return DataError(f"{part.path}: no row is left: {counts}", hint=first)


def _set_aside(rows: Rows, share: float, seed: int, problem: str | None) -> tuple[Rows, Rows | None]:
    """Return the rows that remain, and those that are set aside."""
    if not share:
        return rows, None
    remaining, aside = split(rows, share=share, seed=seed, problem=problem)
    return rows.only(remaining), rows.only(aside)


def _build_preparation(
    parts: tuple[PreparedFile, ...],
    splits: Mapping[str, Rows | None],
    options: ReadOptions,
    choices: Mapping[str, object],
) -> Preparation:
    rows, sample_format, train = parts[0].examined.rows, options.sample_format, splits["train"]
    assert train is not None
    is_chat, template = get_answer_format(rows.format) == "chat", sample_format.template
    settings = {
        "base": options.base,
        "max_length": sample_format.max_length,
        "chat_template": options.chat_template if is_chat else None,
        "chat_template_kwargs": dict(template.variables) if is_chat and template else {},
        "learn": sample_format.learn,
        "rename": options.rename,
        "relabel": options.relabel,
        "problem": parts[0].examined.problem,
        "encoding": parts[0].examined.encoding,
        **describe_answers(options),
        **choices,
    }
    return Preparation(
        parts=parts,
        format=rows.format,
        layout=rows.layout,
        task=_find_task(rows, sample_format.task),
        train=train,
        validation=splits["validation"],
        test=splits["test"],
        hidden_size=options.hidden_size,
        settings=settings,
        files={},
    )


def _find_task(rows: Rows, generative_task: str) -> str:
    """Return the task that rows are for: the base's generative task where that learns from them."""
    if is_preference(rows.format) or rows.format in PROMPT_FORMATS:
        return CAUSAL_LM
    return next(task for task in (generative_task, *FORMATS) if rows.format in FORMATS[task])
