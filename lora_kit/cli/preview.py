"""`preview`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lora_kit.cli.app import AsJson, app
from lora_kit.cli.next_steps import build_command, print_next
from lora_kit.cli.output import create_console, print_json
from lora_kit.errors import DataError
from lora_kit.io.text import escape_for_terminal

if TYPE_CHECKING:
    from lora_kit.data.batches import EncodedDataset
    from lora_kit.data.preview import Span
    from lora_kit.data.rows import Rows
    from lora_kit.data.sample_format import SampleFormat
    from lora_kit.models.protocols import Tokenizer
    from lora_kit.training.recipe.recipe import Recipe


@app.command
def preview(
    recipe: Path,
    /,
    *,
    row: int = 1,
    validation: Annotated[bool, Parameter(negative="")] = False,
    json: AsJson = False,
) -> None:
    """Show one sample of a recipe as the model sees it, and which parts the loss is computed on.

    Example: lora-kit preview recipe.yaml --row 2

    Args:
        recipe: The recipe's file.
        row: Number of the row, from 1.
        validation: Show a row of the validation data.
    """
    from lora_kit.data.preview import preview_sample

    tokenizer, samples, summary = _load_sample(recipe, row, "validation" if validation else "train")
    spans = [preview_sample(tokenizer, samples, place) for place in range(len(samples))]
    if json:
        print_json({"samples": [[asdict(span) for span in each] for each in spans], "summary": summary})
        return
    for place, each in enumerate(spans, 1):
        if len(spans) > 1:
            print(f"--- sample {place} of {len(spans)} of this row")
        _show_spans(each)
    print(summary)
    print_next([build_command("train", recipe)])


def _load_sample(path: Path, row: int, side: str) -> tuple[Tokenizer, EncodedDataset, str]:
    """Return the tokenizer of a recipe, the samples of one of its rows, and what is learned of them in a sentence."""
    from lora_kit.data.encode import encode_rows
    from lora_kit.data.mixture import read_source
    from lora_kit.data.preferences import get_answer_format
    from lora_kit.data.sample_format import DEFAULT_MAX_LENGTH, SampleFormat
    from lora_kit.data.templates import chat_template
    from lora_kit.models.loading import load_input_spec
    from lora_kit.training.recipe.load import load_recipe
    from lora_kit.training.recipe.objectives import count_answer_tokens, find_layout_finder

    recipe = load_recipe(path)
    file = getattr(recipe.data, side)
    if file is None:
        raise DataError(f"{path} has no data.{side}")
    rows = read_source(file, split=side, seed=recipe.seed, find=find_layout_finder(recipe.objective))
    if not 1 <= row <= len(rows):
        raise DataError(f"row {row} was asked for; {rows.path} has {len(rows):,}", hint="rows count from 1")
    reader = load_input_spec(recipe.base)
    tokenizer, limit = reader.tokenizer, reader.max_length
    template = None
    if get_answer_format(rows.format) == "chat":
        variables = recipe.data.chat_template_kwargs
        template = chat_template(recipe.data.chat_template, tokenizer, base=recipe.base, variables=variables)
    problem, names = _find_labels(recipe)
    max_length = recipe.data.max_length or min(limit, DEFAULT_MAX_LENGTH)
    sample_format = SampleFormat(
        max_length=max_length,
        separator=recipe.data.separator,
        template=template,
        learn=recipe.data.learn,
        label2id={name: number for number, name in enumerate(names)},
        task=recipe.task,
        problem=problem,
        answer_tokens=count_answer_tokens(recipe.objective, recipe.train, max_length),
    )
    chosen = rows.only([row - 1])
    samples = encode_rows(chosen, tokenizer, sample_format)
    return tokenizer, samples, _summarize(chosen, tokenizer, samples, sample_format)


def _summarize(row: Rows, tokenizer: Tokenizer, samples: EncodedDataset, sample_format: SampleFormat) -> str:
    """Return how much of one row is learned; of a conversation by role, of a text with a label its label."""
    from lora_kit.data.preview import count_learned_by_role
    from lora_kit.data.prompt_rows import PROMPT_FORMATS

    tokens = samples.num_tokens
    if row.format in ("label", "words"):
        label = " ".join(map(str, row.labels[0])) or "none"
        return f"{tokens:,} tokens, label {escape_for_terminal(label)}"
    if row.format in PROMPT_FORMATS:
        more = sample_format.answer_tokens
        return f"{tokens:,} tokens of the prompt; the model writes answers of up to {more:,} tokens, which are rewarded"
    summary = f"{samples.num_labels:,} of {tokens:,} tokens are learned ({samples.num_labels / tokens:.0%})"
    if row.format != "chat":
        return summary
    shares = count_learned_by_role(row.values[0][0], tokenizer, sample_format)
    return f"{summary}: {', '.join(f'{role} {learned:,} of {count:,}' for role, (learned, count) in shares.items())}"


def _find_labels(recipe: Recipe) -> tuple[str, tuple[str, ...]]:
    """Return what the labels of a recipe's training rows are, and their names; none without labels."""
    from lora_kit.data.label_problem import list_label_names, resolve_problem
    from lora_kit.data.mixture import read_source
    from lora_kit.models.tasks import CLASSIFY, LABEL_TASKS, SINGLE_LABEL

    if recipe.task not in LABEL_TASKS:
        return SINGLE_LABEL, ()
    rows = read_source(recipe.data.train, split="train", seed=recipe.seed)
    problem = resolve_problem(rows, recipe.problem) if recipe.task == CLASSIFY else SINGLE_LABEL
    return problem, list_label_names(rows, problem)


def _show_spans(spans: Sequence[Span]) -> None:
    """Print spans in color on a terminal; elsewhere one span a line, `+` before those with a loss."""
    screen = create_console()
    if not screen.is_terminal:
        print("\n".join(f"{'+' if span.learned else ' '} {escape_for_terminal(repr(span.text))}" for span in spans))
        return
    from rich.text import Text

    text = Text()
    for span in spans:
        text.append(escape_for_terminal(span.text), style="bold green" if span.learned else "dim")
    screen.print(text)
