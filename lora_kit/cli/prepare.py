"""`prepare`."""

from __future__ import annotations

import contextlib
import inspect
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from lora_kit.cli.app import AsJson, Replace, app
from lora_kit.cli.next_steps import build_command, format_word, print_next
from lora_kit.cli.output import print_json, print_table, print_text
from lora_kit.errors import DataError, format_list
from lora_kit.names import KIT_BASE

if TYPE_CHECKING:
    from lora_kit.data.preparation.prepared_folder import Preparation, PreparedFile

_BAR_WIDTH: Final = 40
"""Characters of the longest bar of a histogram."""
_MAX_LINES: Final = 10
"""Lines printed for each kind of finding; the manifest has all of them."""
_FEW_ROWS: Final = 20
"""Fewer rows than these are a coarse measure of what was learned."""
_MEANINGS: Final = {
    "bad": "cannot be read as rows",
    "empty": "without text or label",
    "long": "too long to be trained on",
    "duplicates": "are equal to an earlier row",
    "conflicts": "have different labels",
    "leaks": "have the input of a row for validation",
    "rare": "have a label that too few rows have to learn it",
}

ChatTemplateName = Annotated[
    str | None, Parameter(help="Template of conversations: plain, or a Jinja file; by default the base's own.")
]
ChatTemplateKwargs = Annotated[
    list[str] | None,
    Parameter(negative="", consume_multiple=True, help="What the template is given besides: enable_thinking=false."),
]
_LEARN_HELP: Final = (
    "Answers of a conversation that are learned: all, but for those that say train: false; last; or marked."
)
Learn = Annotated[str, Parameter(help=_LEARN_HELP)]
_RENAME_HELP: Final = (
    "New names of columns: question=prompt answer=completion; ts= takes a column, or a key of messages, out."
)
Rename = Annotated[
    list[str] | None,
    Parameter(negative="", consume_multiple=True, help=_RENAME_HELP),
]
_RELABEL_HELP: Final = (
    "New names of labels: postive=positive; or auto, for labels that differ in case, blanks, umlauts or one slip."
)
Relabel = Annotated[list[str] | None, Parameter(negative="", consume_multiple=True, help=_RELABEL_HELP)]
Drop = Annotated[
    list[str] | None,
    Parameter(
        negative="",
        consume_multiple=True,
        help="Rows to leave out: bad, empty, long, duplicates, conflicts, leaks, rare.",
    ),
]

Encoding = Annotated[str, Parameter(help="Encoding of the file: utf-8, utf-16, cp1252, …; by default it is found out.")]
_SHARE_HELP: Final = "Share of the rows set aside for validation, 0 for none; by default 0.05, but at least 20 rows."
Share = Annotated[float | None, Parameter(help=_SHARE_HELP)]
TestShare = Annotated[float, Parameter(help="Share of the rows set aside for a test, in test.jsonl.")]
SplitSeed = Annotated[int, Parameter(help="Seed of the split.")]
Problem = Annotated[
    str | None,
    Parameter(help="For texts with labels: single-label, multi-label or regression; by default what the labels are."),
]

_REWARDS_HELP: Final = (
    "For objective grpo: functions that reward answers of the model's own, rewards.py:has_answer; rows are prompts."
)
Rewards = Annotated[list[str] | None, Parameter(negative="", consume_multiple=True, help=_REWARDS_HELP)]


@app.command
def prepare(
    source: Path,
    /,
    *,
    out: Path | None = None,
    validation: Path | None = None,
    share: Share = None,
    test: TestShare = 0.0,
    base: str = KIT_BASE,
    max_length: int | None = None,
    chat_template: ChatTemplateName = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    learn: Learn = "all",
    rename: Rename = None,
    relabel: Relabel = None,
    encoding: Encoding = "auto",
    problem: Problem = None,
    rewards: Rewards = None,
    drop: Drop = None,
    seed: SplitSeed = 0,
    replace: Replace = False,
    json: AsJson = False,
) -> None:
    """Examine a file of rows, fix it, split it, and write a recipe to train with.

    Reads JSONL, JSON, CSV, TSV, Parquet and text: prompt and completion, instructions, chats, text and label, text.

    Example: lora-kit prepare rows.csv --out data

    Args:
        source: The file, or a data set of the hub: owner/name:split or owner/name/config:split.
        out: Folder to write; without it the file is only examined.
        validation: Separate file or data set for validation; by default a share of the rows.
        base: Base model whose tokens are counted: hub id, local folder or kit-base.
        max_length: Tokens of a sample, at most; by default the context of the base, at most 2,048.
    """
    from lora_kit.data.preparation.prepare import prepare as run

    with _complete_hints(given := locals()):
        preparation = run(
            source,
            out,
            validation=validation,
            share=share,
            test=test,
            base=base,
            max_length=max_length,
            template=chat_template,
            template_variables=_parse_variables(chat_template_kwargs or ()),
            learn=learn,
            rename=parse_renames(rename or (), "rename", "question=prompt answer=completion"),
            relabel=_parse_relabel(relabel or ()),
            problem=problem,
            rewards=_parse_rewards(rewards or ()),
            encoding=encoding,
            drop=drop or (),
            seed=seed,
            replace=replace,
        )
    print_json(preparation.to_json()) if json else _show_preparation(preparation, given)


def parse_renames(items: Sequence[str], flag: str, example: str) -> dict[str, str]:
    """Return `{"question": "prompt"}` for `["question=prompt"]`."""
    parts = [item.rpartition("=") for item in items]
    may_be_removed = flag == "rename"
    wrong = [item for item, (old, _, new) in zip(items, parts, strict=True) if not old or not (new or may_be_removed)]
    if wrong:
        raise DataError(f"{flag} {wrong[0]!r} is not old=new", hint=f"--{flag} {example}")
    return {old: new for old, _, new in parts}


def _parse_variables(items: Sequence[str]) -> dict[str, object]:
    """Return `{"enable_thinking": False}` for `["enable_thinking=false"]`."""
    from lora_kit.training.recipe.strict_yaml import parse_yaml

    pairs = [item.partition("=") for item in items]
    wrong = [item for item, (name, equals, _) in zip(items, pairs, strict=True) if not name or not equals]
    if wrong:
        what = f"chat-template-kwargs {wrong[0]!r} is not name=value"
        raise DataError(what, hint="--chat-template-kwargs enable_thinking=false")
    return {name: parse_yaml(f"--chat-template-kwargs {name}", value) for name, _, value in pairs}


def _parse_rewards(items: Sequence[str]) -> list[str]:
    from lora_kit.training.recipe.reward_specs import parse_rewards

    return [spec.name for spec in parse_rewards(list(items))]


def _parse_relabel(items: Sequence[str]) -> dict[str, str] | str:
    return "auto" if items == ["auto"] else parse_renames(items, "relabel", "postive=positive")


def _show_preparation(preparation: Preparation, given: Mapping[str, object]) -> None:
    for part in preparation.parts:
        _show_file(part, preparation)
    _show_next_steps(preparation, given)


def _show_file(part: PreparedFile, preparation: Preparation) -> None:
    examined = part.examined
    tokens = part.tokens
    cut, length = len(examined.measured.cut), preparation.settings["max_length"]
    facts = [
        (part.path.name, f"{examined.total:,} rows: {preparation.layout}"),
        ("encoding", "" if examined.encoding == "utf-8" else examined.encoding),
        ("not used", format_list(list(examined.unused)) if examined.unused else ""),
        ("tokens", f"{tokens['shortest']:,} to {tokens['longest']:,} in a row, median {tokens['median']:,}"),
        ("learned", f"{tokens['learned']:.0%} of the tokens" if tokens["learned"] else ""),
        ("cut", f"{cut:,} rows at {length:,} tokens ({preparation.settings['base']})" if cut else ""),
        *((kind, text) for kind, text in _list_findings(part)),
    ]
    print_table(("", ""), [fact for fact in facts if fact[1]])
    bins = tokens["histogram"]
    most = max((count for _, _, count in bins), default=1) or 1
    bars = [(f"{low:,}–{high:,}", f"{count:,}", "█" * round(_BAR_WIDTH * count / most)) for low, high, count in bins]
    print_table(("tokens", "rows", ""), bars)
    labels = examined.labels
    shown = list(labels.items())[:_MAX_LINES]
    labeled, what = sum(labels.values()), "words" if examined.rows.format == "words" else "rows"
    print_table(("label", what, "share"), [(n, f"{c:,}", f"{c / labeled:.1%}") for n, c in shown])
    if len(labels) > len(shown):
        print(f"and {len(labels) - len(shown)} more labels, the rarest with {min(labels.values()):,} {what}")
    if examined.joined_by:
        print_text(f"conversations: the rows with the same {examined.joined_by}, in the order of the file")
    if examined.roles:
        print_text(f"roles renamed: {_describe_names(examined.roles)}")
    if examined.relabeled:
        print_text(f"relabeled: {_describe_names(examined.relabeled)}")
    if examined.variants:
        names = _describe_names(examined.variants)
        print_text(f"labels that differ only in case, blanks or umlauts: {names}: --relabel auto")
    rare = examined.rare_labels if part is preparation.parts[0] and "rare" not in part.dropped else {}
    for label, other in examined.lookalikes.items():
        if label in examined.variants or label in rare:
            continue
        likely = shlex.quote(f"{label}={other}")
        share = f"{labels[label]:,} of {labeled:,} {what}"
        print_text(f"label {label!r} ({share}) looks like {other!r}: --relabel {likely}")
    _show_rare_labels(rare, {**examined.lookalikes, **examined.variants}, what)
    print()


def _show_rare_labels(rare: Mapping[str, int], near: Mapping[str, str], what: str) -> None:
    """Warn of labels that cannot be learned.

    Args:
        rare: how many rows have each.
        near: the label that is probably meant, by label.
        what: `rows` or `words`, which have the labels.
    """
    for label, count in list(rare.items())[:_MAX_LINES]:
        likely = f"--relabel {shlex.quote(f'{label}={near[label]}')}, or " if label in near else ""
        counted = f"{count} {what if count > 1 else what.removesuffix('s')}"
        print_text(f"label {label!r} has {counted}, too few to learn: {likely}--drop rare")
    if len(rare) > _MAX_LINES:
        print(f"and {len(rare) - _MAX_LINES:,} more labels with too few {what} to learn")


def _describe_names(names: Mapping[str, str]) -> str:
    return format_list([f"{old!r} is {new!r}" for old, new in names.items()], most=_MAX_LINES)


def _list_findings(part: PreparedFile) -> Iterator[tuple[str, str]]:
    """Yield each kind of finding with its lines, and what was done about it."""
    examined = part.examined
    for kind in ("bad", "empty", "long"):
        faults = [f"line {fault.line}: {fault.what}" for fault in examined.faults if fault.kind == kind]
        yield kind, _describe_finding(kind, faults, part) if faults else ""
    if "rare" in part.dropped:
        yield "rare", _describe_finding("rare", [f"line {line}" for line in part.dropped["rare"]], part)
    for kind, lines in (("duplicates", examined.duplicates), ("conflicts", examined.conflicts), ("leaks", part.leaks)):
        repeats = [f"line {line}, see {other}" for line, other in lines.items()]
        yield kind, _describe_finding(kind, repeats, part) if repeats else ""


def _describe_finding(kind: str, items: Sequence[str], part: PreparedFile) -> str:
    done = "left out" if kind in part.dropped else "kept"
    if kind in ("bad", "empty", "long") and done == "kept":
        done = f"fix them, or --drop {kind}"
    count = f"{len(items):,}"
    if kind == "conflicts":
        conflicts = part.examined.conflicts
        rows, inputs = len({*conflicts, *conflicts.values()}), len(set(conflicts.values()))
        count = f"{rows:,} rows of {inputs:,} {'input' if inputs == 1 else 'inputs'}"
    more = [f"and {len(items) - _MAX_LINES:,} more"] if len(items) > _MAX_LINES else []
    return "\n".join([f"{count} {_MEANINGS[kind]} ({done})", *items[:_MAX_LINES], *more])


def _show_few_rows(preparation: Preparation) -> None:
    """Say what a validation on few rows, or on none, is worth."""
    count = len(preparation.validation or ())
    if preparation.validation is None and preparation.settings["share"] == 0 and len(preparation.parts) == 1:
        print_text("nothing is validated on: with so few rows, give --validation FILE, or a --share of them")
    elif count < _FEW_ROWS:
        print_text(
            f"{count:,} rows to validate on say little: one row is {1 / count:.0%}; --validation FILE gives more"
        )


def _show_next_steps(preparation: Preparation, given: Mapping[str, object]) -> None:
    rows = f"{len(preparation.train):,} rows to train on, {len(preparation.validation or ()):,} to validate on"
    rows += f", {len(preparation.test):,} to test on" if preparation.test else ""
    _show_few_rows(preparation)
    if preparation.recipe is None:
        command = _build_writing_command(preparation, given)
        print_text(f"{rows}; nothing was written, --out FOLDER does")
        print_next([command])
        return
    if preparation.settings["chat_template"] == "plain":
        print_text(f"{preparation.settings['base']} has no chat template of its own: the recipe says plain")
    print_text(f"{rows}: {preparation.out}")
    print_next([build_command(verb, preparation.recipe) for verb in ("preview", "train")])


def _build_writing_command(preparation: Preparation, given: Mapping[str, object]) -> str:
    """Return the command that fixes what was found and writes the rows.

    Args:
        given: the arguments of `prepare` by name; those that differ from their default are repeated.
    """
    examined = [part.examined for part in preparation.parts]
    found = {fault.kind for each in examined for fault in each.faults}
    found |= {"duplicates"} if any(each.duplicates for each in examined) else set()
    found |= {"conflicts"} if any(each.conflicts for each in examined) else set()
    found |= {"leaks"} if any(part.leaks for part in preparation.parts) else set()
    found |= {"rare"} if preparation.parts[0].has_few_rare_rows else set()
    is_misspelled = any(each.variants or each.lookalikes for each in examined)
    source = Path(str(given["source"]))
    values = {
        **given,
        "relabel": given["relabel"] or (["auto"] if is_misspelled else None),
        "drop": [*_as_list(given["drop"]), *(kind for kind in _MEANINGS if kind in found)],
        "out": Path("data") / source.name.partition(".")[0],
    }
    return build_command("prepare", source, *_list_flags(values))


def _list_flags(values: Mapping[str, object]) -> list[str]:
    """Return the flags of the arguments that differ from their default."""
    flags = list[str]()
    for name, parameter in inspect.signature(prepare).parameters.items():
        items = _as_list(values[name])
        if items and values[name] != parameter.default and name != "source":
            flags += [f"--{name.replace('_', '-')}", *map(format_word, dict.fromkeys(items))]
    return flags


@contextlib.contextmanager
def _complete_hints(given: Mapping[str, object]) -> Iterator[None]:
    """Where an error's hint is a command that renames columns, add the flags that were given as well."""
    try:
        yield
    except DataError as error:
        if error.hint.startswith("lora-kit prepare ") and " --rename " in error.hint:
            renames = shlex.join(map(str, _as_list(given["rename"])))
            flags = shlex.join(_list_flags({**given, "rename": None}))
            error.hint = " ".join(part for part in (error.hint, renames, flags) if part)
        raise


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [] if value is None else [value]
