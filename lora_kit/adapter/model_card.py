"""Model cards: the README of an adapter, an export or a merged model, with a table of facts and code that loads it.

Every text that others may have written (names, metrics) is escaped here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from lora_kit.config.lora_config import LoraConfig
from lora_kit.config.peft_fields import LABEL_TASK_NAMES, find_task_name
from lora_kit.errors import format_list
from lora_kit.io.text import escape_text

_MARKUP: Final = re.compile(r"[\\`*\[\]|<>&]")
"""Characters that begin markup: code, emphasis, links, pictures, table cells, tags and entities of HTML."""
_ENTITIES: Final[Mapping[str, str]] = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
_MAX_LABELS: Final = 50
"""Labels that a card lists."""

TAG: Final = "lora-kit"
"""Tag of every card in the YAML that model hubs read."""

# Parts of any card


def render_card(title: str, *sections: str) -> str:
    """Return a card in Markdown: its title, then its sections, an empty line between each two."""
    return "\n\n".join([f"# {escape_markdown(title)}", *(section.strip("\n") for section in sections)]) + "\n"


def format_front_matter(fields: Mapping[str, object]) -> str:
    """Return the YAML that model hubs read, to stand before a card; fields without a value are left out."""
    import yaml

    given = {name: value for name, value in fields.items() if value}
    return f"---\n{yaml.safe_dump(given, sort_keys=False, allow_unicode=True)}---\n"


def list_adapter_front_matter(base: str | None, *, tag: str) -> dict[str, object]:
    """Return the fields of an adapter for `format_front_matter`.

    Args:
        base: name of the base; None where it is not known.
        tag: the kind of adapter.
    """
    relation = "adapter" if base else None
    return {"library_name": "peft", "base_model": base, "base_model_relation": relation, "tags": [tag, TAG]}


def format_table(rows: Iterable[Sequence[object]], *, head: Sequence[str] = ("", "")) -> str:
    """Return a Markdown table; every cell is escaped."""
    lines = [f"| {' | '.join(map(escape_markdown, row))} |" for row in (head, *rows)]
    return "\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]])


def format_metrics(metrics: object) -> list[tuple[str, str]]:
    """Return the rows of a table for measured values by name; none where a record of others holds anything else."""
    items = metrics.items() if isinstance(metrics, Mapping) else ()
    return [(str(key), f"{value:.6g}" if isinstance(value, float) else str(value)) for key, value in items]


def format_labels(labels: object) -> list[tuple[str, str]]:
    """Return the row of a table for the labels of a head in the order of its classes; none where there are none."""
    names = list(map(str, labels)) if isinstance(labels, list) else []
    return [("labels", format_list(names, most=_MAX_LABELS))] if names else []


def format_checkpoint(checkpoint: object) -> list[tuple[str, str]]:
    """Return the row of a table for an adapter whose training had not ended; none for any other."""
    if not isinstance(checkpoint, Mapping) or not {"step", "steps"} <= checkpoint.keys():
        return []
    return [("taken from a training", f"at step {checkpoint['step']} of {checkpoint['steps']}")]


def format_code(code: str) -> str:
    """Return Python code as a Markdown block."""
    return f"```python\n{code}\n```"


def format_inline_code(code: object) -> str:
    """Return text as code within a line of Markdown, whatever backticks are in it."""
    text = escape_text(code)
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{fence}{text}{fence}" if "`" not in text else f"{fence} {text} {fence}"


def escape_markdown(value: object) -> str:
    """Return text from outside so that neither Markdown nor HTML reads anything but text in it."""
    return _MARKUP.sub(lambda match: _ENTITIES.get(match[0]) or f"\\{match[0]}", escape_text(value))


# Code that loads it


def write_base_loading_code(base: str, *, task: str, labels: int = 0, problem: str | None = None) -> str:
    """Return the line of Python that loads a base.

    Args:
        labels: how many there are, where the task has labels.
        problem: what task `classify` predicts; None for other tasks.
    """
    options = "" if task == "causal-lm" else f", task={task!r}"
    options += f", num_labels={labels}" if labels else ""
    options += f", problem={problem!r}" if problem not in (None, "single-label") else ""
    return f"base = lk.load_base({base!r}{options})"


def write_bank_loading_code(name: str, folder: str, *, model: str = "model") -> str:
    """Return Python that loads an adapter into a bank beside the model of this variable."""
    return f"bank = lk.attach({model}, slots=1)\nbank.load({name!r}, {folder!r})\nbank.use({name!r})"


def write_peft_loading_code(base: str, folder: str, *, task: str, labels: int = 0, problem: str | None = None) -> str:
    """Return Python that loads a base, and with PEFT an adapter on it; arguments as in `write_base_loading_code`."""
    return (
        "import lora_kit as lk\nfrom peft import PeftModel\n\n"
        f"{write_base_loading_code(base, task=task, labels=labels, problem=problem)}\n"
        f"model = PeftModel.from_pretrained(base.model, {folder!r})"
    )


# An adapter's card


def render_adapter_card(
    name: str, config: LoraConfig, facts: Mapping[str, Any], *, parameters: int, digest: str
) -> bytes:
    """Return the card of an adapter: what it is, what was measured, how to load it.

    Args:
        facts: as the adapter's record has them: `metrics` by name, `labels` of its head in the order of the classes,
            the `problem` of task `classify`, and which `checkpoint` of a training it is.
        parameters: how many values it holds.
    """
    labels = facts.get("labels")
    targets = config.target_modules if isinstance(config.target_modules, str) else ", ".join(config.target_modules)
    rows = [
        ("base", config.base_model_name_or_path or "unknown"),
        ("rank, alpha", f"{config.r}, {config.lora_alpha:g}" if config.target_modules else "no LoRA weights"),
        ("target modules", targets or "none"),
        ("modules saved whole", ", ".join(config.modules_to_save) or "none"),
        *([("token embeddings", describe_tokens(config))] if config.trainable_token_indices else []),
        *format_labels(labels),
        ("parameters", f"{parameters:,}"),
        ("digest", digest),
        *format_checkpoint(facts.get("checkpoint")),
        *format_metrics(facts.get("metrics")),
    ]
    path = name_local_path(name)
    count = len(labels) if isinstance(labels, list) else 0
    card = render_card(
        name,
        "A LoRA adapter trained with lora_kit.",
        format_table(rows),
        *_write_adapter_loading(name, config, path, labels=count, facts=facts),
        "It is in PEFT's format: "
        + format_inline_code(f"peft.PeftModel.from_pretrained(base.model, {path!r})")
        + " loads it as well.",
    )
    fields = list_adapter_front_matter(config.base_model_name_or_path, tag="lora")
    return (format_front_matter(fields) + card).encode()


def name_local_path(name: str) -> str:
    """Return the path that stands for a folder in a card's code, before it is known where the folder will be."""
    return f"path/to/{name}"


def _write_adapter_loading(
    name: str, config: LoraConfig, path: str, *, labels: int, facts: Mapping[str, Any]
) -> Iterator[str]:
    """Yield the sections of a card that show how an adapter is loaded on its base, and what it predicts."""
    task, base = find_task_name(config.task_type), config.base_model_name_or_path
    bank = write_bank_loading_code(name, path, model="base.model")
    predicts_labels = task in LABEL_TASK_NAMES
    if base is None or (predicts_labels and not labels):
        yield format_code(f"import lora_kit as lk\n\n{bank}")
        yield "`base` is what `lk.load_base` returns for the base of this adapter."
        return
    if predicts_labels:
        example = ("a text", "another text") if facts.get("text_pairs") else "a text"
        yield format_code(f"import lora_kit as lk\n\nprint(lk.predict({base!r}, {path!r}, [{example!r}]))")
        yield "The model itself, for code of your own:"
    count = labels if predicts_labels else 0
    loading = write_base_loading_code(base, task=task or "causal-lm", labels=count, problem=facts.get("problem"))
    yield format_code(f"import lora_kit as lk\n\n{loading}\n{bank}")


def describe_tokens(config: LoraConfig) -> str:
    """Return which tokens an adapter has embeddings of, in words; an empty string where it has none."""
    tokens = config.trainable_token_indices or ()
    by_name = tokens if isinstance(tokens, Mapping) else {"": tokens} if tokens else {}
    lists = [(name, format_list([str(index) for index in indices])) for name, indices in by_name.items()]
    return "; ".join(f"{name}: {indices}" if name else indices for name, indices in lists)
