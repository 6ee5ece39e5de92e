"""The sections of a report on answers: what changed, which labels are confused, the mistakes, samples side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from lora_kit.data.messages import Conversation
from lora_kit.evaluation.eval_report import Answer, EvalCase
from lora_kit.evaluation.label_answers import describe_answer
from lora_kit.evaluation.outcomes import (
    LabelFigures,
    ModelAnswers,
    Outcomes,
    compute_label_figures,
    count_confusions,
    mark_spans,
)
from lora_kit.io.text import parse_number
from lora_kit.models.tasks import LABEL, LABEL_SET, VALUE, WORD
from lora_kit.reporting.page import (
    Fact,
    Markup,
    escape_html,
    format_figure,
    render_charts,
    render_facts,
    render_section,
    render_table,
)
from lora_kit.reporting.plots import MOST_LABELS, MOST_SMALL_LABELS, Curve, can_plot, plot_confusion, plot_points

_MOST_MISTAKES: Final = 30
_MOST_PAIRS: Final = 15
_MOST_SAMPLES: Final = 12
_MOST_CHARACTERS: Final = 1_200
"""Characters of a text on a page; what is longer is cut in the middle."""


def render_outcomes(outcomes: Outcomes) -> Iterator[str]:
    """Yield the sections of a report on answers, those that a reader asks for first at the beginning."""
    if not outcomes.cases:
        return
    if outcomes.kind == VALUE:
        yield _render_numbers(outcomes)
        yield _render_mistakes(outcomes, title="The greatest errors")
    elif outcomes.kind in (LABEL, LABEL_SET, WORD):
        yield _render_changes(outcomes)
        yield _render_confusions(outcomes) if outcomes.kind == LABEL else ""
        yield _render_labels(outcomes)
        yield _render_mistakes(outcomes, title="The mistakes, worst first")
    else:
        yield _render_samples(outcomes)


def _describe_scope(outcomes: Outcomes) -> str:
    count = len(outcomes.cases)
    part = f"{count:,} of {outcomes.total:,} rows, evenly chosen" if count < outcomes.total else f"{count:,} rows"
    return f"{part}, as they were written."


def _render_changes(outcomes: Outcomes) -> str:
    """Return how many answers became right and wrong, with rows that the reference had right."""
    main, other = outcomes.main, outcomes.compared
    indices = range(len(outcomes.cases))
    right = {index for index in indices if outcomes.is_right(main, index)}
    facts = [_count_right(outcomes, main)]
    if other is None:
        facts = [_count_right(outcomes, model) for model in outcomes.models]
        return render_section("Right and wrong", render_facts(facts), note=_describe_scope(outcomes))
    before = {index for index in indices if outcomes.is_right(other, index)}
    lost = sorted(before - right)
    facts = [_count_right(outcomes, other), *facts]
    facts += [Fact("became right", f"{len(right - before):,}"), Fact("became wrong", f"{len(lost):,}")]
    facts.append(Fact("wrong with both", f"{len(indices) - len(right | before):,}"))
    rows = [_list_cells(outcomes, index, [other, main]) for index in lost[:5]]
    table = render_table(("line", "text", "expected", other.name, main.name), rows)
    said = f'<p class="note">Right with {escape_html(other.name)}, wrong now:</p>' if rows else ""
    return render_section("What changed", render_facts(facts), said, table, note=_describe_scope(outcomes))


def _count_right(outcomes: Outcomes, model: ModelAnswers) -> Fact:
    count = len(outcomes.cases)
    return Fact(
        f"right: {model.name}", f"{sum(outcomes.is_right(model, index) for index in range(count)):,} of {count:,}"
    )


def _render_confusions(outcomes: Outcomes) -> str:
    """Return a matrix for each model that is measured, and a table of the labels that are confused most."""
    models = [model for model in outcomes.models if model is not outcomes.compared]
    counts = [count_confusions(outcomes, model) for model in models]
    figures = []
    if can_plot() and 2 <= len(outcomes.labels) <= MOST_LABELS:
        for model, own in zip(models, counts, strict=True):
            matrix = [[own[true, said] for said in outcomes.labels] for true in outcomes.labels]
            title = "confusion matrix" if len(models) == 1 else f"confusion matrix of {model.name}"
            figures.append(f'<div class="wide">{plot_confusion(title, matrix, outcomes.labels)}</div>')
    wrong = [pair for pair, _ in sum(counts, Counter[tuple[str, str]]()).most_common() if pair[0] != pair[1]]
    rows = [(*pair, *(f"{own[pair]:,}" for own in counts)) for pair in wrong[:_MOST_PAIRS]]
    header = ("expected", "predicted", *(["count"] if len(models) == 1 else (f"by {model.name}" for model in models)))
    is_small = len(outcomes.labels) <= MOST_SMALL_LABELS
    return render_section(
        "Which labels are confused",
        render_charts(figures) if is_small else "".join(figures),
        render_table(header, rows) if len(outcomes.labels) > 2 else "",
    )


def _render_labels(outcomes: Outcomes) -> str:
    """Return a table with a row for each label, the weakest first."""
    figures = compute_label_figures(outcomes, outcomes.main)
    other = outcomes.compared
    before: Mapping[str, LabelFigures] = {} if other is None else compute_label_figures(outcomes, other)
    header = ["label", "rows", "precision", "recall", "F1", *([f"F1 {other.name}"] if other is not None else [])]
    rows = [
        (
            name,
            f"{each.count:,}",
            *(_format_share(value) for value in (each.precision, each.recall, each.f1)),
            *([_format_share(before[name].f1 if name in before else None)] if other is not None else []),
        )
        for name, each in sorted(figures.items(), key=lambda item: (item[1].f1, item[0]))
    ]
    return render_section(
        "Label by label",
        render_table(header, rows, numbers=True),
        note=(
            f"{_name_subject(outcomes)}The weakest label first. Precision: how much of what got the label "
            "has it. Recall: how much of what has the label got it."
        ),
    )


def _format_share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _render_mistakes(outcomes: Outcomes, *, title: str) -> str:
    main, other = outcomes.main, outcomes.compared
    wrong = [index for index in range(len(outcomes.cases)) if not outcomes.is_right(main, index)]
    worst = sorted(wrong, key=lambda index: -main.misses[index] if main.misses else index)[:_MOST_MISTAKES]
    shown = outcomes.models if other is None else [other, main]
    size = {LABEL: "sure", LABEL_SET: "beyond", VALUE: "error", WORD: "wrong"}[outcomes.kind]
    header = ("line", "text", "expected", *(model.name for model in shown), *([size] if main.misses else []))
    rows = [
        [*_list_cells(outcomes, index, shown), *([f"{main.misses[index]:.3g}"] if main.misses else [])]
        for index in worst
    ]
    count = f"{len(worst):,} of {len(wrong):,} rows. " if len(worst) < len(wrong) else ""
    meaning = {
        LABEL: "“sure” is the probability of the wrong label.",
        LABEL_SET: "“beyond” is how far the worst label is on the wrong side of its threshold.",
        VALUE: "“error” is the distance from the right number.",
        WORD: "“wrong” is the share of wrong words.",
    }[outcomes.kind]
    return render_section(title, render_table(header, rows), note=f"{_name_subject(outcomes)}{count}{meaning}")


def _name_subject(outcomes: Outcomes) -> str:
    """Return whose answers a section is about, where other models could be meant."""
    is_clear = len(outcomes.models) - (outcomes.compared is not None) == 1
    return "" if is_clear else f"Of {outcomes.main.name}. "


def _render_numbers(outcomes: Outcomes) -> str:
    if not can_plot():
        return ""
    expected = [parse_number(case.expected) for case in outcomes.cases]
    clouds = []
    for model in reversed(outcomes.models):
        pairs = ((x, parse_number(said)) for x, said in zip(expected, model.said, strict=True))
        clouds.append(Curve(model.name, [(x, y) for x, y in pairs if x is not None and y is not None]))
    plot = plot_points("predicted numbers", clouds[:4], names=("expected", "predicted"), diagonal=True)
    note = f"{_describe_scope(outcomes)} On the dashed line a prediction is right."
    return render_section("Predicted and expected", render_charts([plot]), note=note)


def _render_samples(outcomes: Outcomes) -> str:
    """Return prompts with the answers of all models beside one another."""
    has_rejected = bool(outcomes.rejected)
    header = ("prompt", "expected", *(["rejected"] if has_rejected else []), *(m.name for m in outcomes.models))
    chosen = _choose_telling(outcomes)
    rows = [
        (
            show_input(outcomes.cases[index].given),
            show_expected(outcomes.cases[index]),
            *([shorten_middle(outcomes.rejected[index])] if has_rejected else []),
            *(_show_text(outcomes, model, index) for model in outcomes.models),
        )
        for index in chosen
    ]
    part = f"{len(rows):,} of {len(outcomes.cases):,} prompts. " if len(rows) < len(outcomes.cases) else ""
    return render_section(
        "Answers side by side",
        render_table(header, rows),
        note=f"{part}The answers are greedy, without sampling; rows are shown as they were written.",
    )


def _choose_telling(outcomes: Outcomes) -> list[int]:
    """Return which cases are shown: those whose answers differ between the models first, in the order of the file."""
    indices = range(len(outcomes.cases))
    telling = sorted(indices, key=lambda index: (len({model.said[index] for model in outcomes.models}) < 2, index))
    return sorted(telling[:_MOST_SAMPLES])


def _show_text(outcomes: Outcomes, model: ModelAnswers, index: int) -> str:
    text = shorten_middle(str(model.said[index]).strip()) or Markup('<span class="quiet">nothing</span>')
    if outcomes.is_right(model, index):
        return Markup(f'<span class="right">{escape_html(text)}</span>')
    return text


# Cells


def _list_cells(outcomes: Outcomes, index: int, models: Sequence[ModelAnswers]) -> list[str]:
    """Return the cells of a row: its line, its text, what is expected, and the answer of each model."""
    case = outcomes.cases[index]
    if outcomes.kind == WORD:
        assert isinstance(case.given, tuple)
        answers = [mark_words(case, tags) for tags in (case.expected, *(model.said[index] for model in models))]
        return [_show_lines(case), shorten_middle(" ".join(case.given)), *answers]
    describe = _round_number if outcomes.kind == VALUE else describe_answer
    said = [describe(model.said[index]) for model in models]
    return [_show_lines(case), show_input(case.given), describe(case.expected), *said]


def _round_number(answer: Answer) -> str:
    number = parse_number(answer)
    return describe_answer(answer) if number is None else format_figure(number)


def _show_lines(case: EvalCase) -> str:
    return ", ".join(map(str, case.lines[:3])) + ("…" if len(case.lines) > 3 else "")


def mark_words(case: EvalCase, tags: Answer) -> Markup:
    """Return the words of a case as HTML, what the tags mark framed and named."""
    words = [str(word) for word in case.given] if isinstance(case.given, tuple) else []
    parts: list[str] = []
    end = 0
    for first, last, kind in mark_spans(tags):
        parts += map(escape_html, words[end:first])
        text = escape_html(" ".join(words[first:last]))
        parts.append(f"<mark>{text} <small>{escape_html(kind)}</small></mark>")
        end = last
    parts += map(escape_html, words[end:])
    return Markup(" ".join(parts))


def show_input(given: object) -> str:
    """Return a prompt, a conversation, a text or two as text."""
    if isinstance(given, Conversation):
        return shorten_middle("\n".join(f"{message.role}: {message.content}" for message in given.messages))
    if isinstance(given, (tuple, list)):
        return shorten_middle("\n".join(map(str, given)))
    return shorten_middle(str(given))


def show_expected(case: EvalCase) -> str:
    """Return the references of a prompt, each once, one below the other."""
    texts = list(dict.fromkeys(case.expected if isinstance(case.expected, tuple) else (case.expected,)))
    more = f"\n(and {len(texts) - 3} more)" if len(texts) > 3 else ""
    return shorten_middle("\n".join(texts[:3])) + more


def shorten_middle(text: str) -> str:
    """Return a text, cut in the middle where it is long."""
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:half]} … {text[-half:]}"


def write_metric_title(metric: str) -> str:
    """Return the name of a metric as the beginning of a sentence."""
    return "Mean error" if metric == "mae" else f"{metric[:1].upper()}{metric[1:]}".replace("_", " ")


def render_metrics(before: Mapping[str, float], after: Mapping[str, float], names: tuple[str, str]) -> str:
    """Return a table of metrics of two models and their difference; empty where only one has any."""
    rows = [
        (name, format_figure(before[name]), format_figure(value), f"{value - before[name]:+.4g}")
        for name, value in after.items()
        if name in before
    ]
    return render_table(("validation", *names, "change"), rows, numbers=True)
