"""The card of a repository of the hub: the folder's own, completed with what others need to know.

What its owner wrote stays. The YAML at its head is filled in, paths that stand for the folder become the repository's
id, and sections on files and limits are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from lora_kit.adapter.model_card import (
    TAG,
    escape_markdown,
    format_code,
    format_front_matter,
    format_table,
    name_local_path,
    render_card,
    write_bank_loading_code,
    write_base_loading_code,
)
from lora_kit.errors import ConfigError
from lora_kit.models.tasks import CAUSAL_LM, TASK_SPECS
from lora_kit.publishing.published_folder import ADAPTER, PublishedFolder

_MARK: Final = "---\n"
_HUB_METRICS: Final = ("accuracy", "f1", "perplexity", "precision", "recall", "rouge", "bleu", "exact_match", "mse")
"""Metrics that the hub has pages for."""
FILES_TITLE: Final = "## Files"
LIMITS_TITLE: Final = "## Limits"


def complete_card(
    text: str | None,
    published: PublishedFolder,
    *,
    repository: str,
    base: str,
    sizes: Mapping[str, int],
    license: str | None,
    datasets: Sequence[str],
) -> str:
    """Return the card of a repository.

    Args:
        text: of the folder's card; None without one.
        published: what the folder holds.
        repository: its id on the hub.
        base: name of the base there.
        sizes: bytes of each file.
        license: its id on the hub; None for what the card says, which may be nothing.
        datasets: ids of those that are named; none are by themselves.

    Raises:
        ConfigError: the YAML at the head of the folder's card cannot be read.
    """
    fields, body = split_front_matter(text or "")
    name = published.folder.resolve().name
    if not body.strip():
        body = _render_plain_card(published, name=name, base=base)
    body = body.replace(name_local_path(name), repository)
    if published.base is not None:
        body = _rename_base(body, published.base, base)
    fields |= _list_fields(published, fields, base=base, license=license, datasets=datasets)
    added = [
        section
        for title, section in (
            (FILES_TITLE, _format_files(sizes)),
            (LIMITS_TITLE, _format_limits(published, base=base, is_licensed=bool(fields.get("license")))),
        )
        if title not in body
    ]
    return format_front_matter(fields) + "\n\n".join([body.strip("\n"), *added]) + "\n"


def _rename_base(body: str, old: str, new: str) -> str:
    """Return a card with another name of the base in its code and in its table of facts."""
    old_cell, new_cell = (f"| base | {escape_markdown(name)} |" for name in (old, new))
    return body.replace(repr(old), repr(new)).replace(old_cell, new_cell)


def split_front_matter(text: str) -> tuple[dict[str, object], str]:
    """Return the YAML at the head of a card, and what follows it.

    Raises:
        ConfigError: it is not a mapping in YAML.
    """
    import yaml

    if not text.startswith(_MARK):
        return {}, text
    head, _, body = text[len(_MARK) :].partition(f"\n{_MARK}")
    try:
        fields = yaml.safe_load(head)
    except yaml.YAMLError as error:
        raise ConfigError(f"the YAML at the head of the model card cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError("the head of the model card is not YAML fields", hint="correct the README.md")
    return fields, body


def _list_fields(
    published: PublishedFolder,
    fields: Mapping[str, object],
    *,
    base: str,
    license: str | None,
    datasets: Sequence[str],
) -> dict[str, object]:
    """Return the fields of the YAML that are set or completed; a name of data stays only where it was asked for."""
    spec = TASK_SPECS.get(published.task or "")
    is_adapter = published.kind == ADAPTER
    tags = fields.get("tags")
    own = [str(tag) for tag in tags] if isinstance(tags, list) else []
    measured = [name for name in _HUB_METRICS if name in published.metrics or f"eval_{name}" in published.metrics]
    return {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": fields.get("pipeline_tag") or (spec.pipeline_tag if spec else None),
        "base_model": base,
        "base_model_relation": "adapter" if is_adapter else "finetune",
        "license": license or fields.get("license"),
        "datasets": list(datasets) or None,
        "metrics": measured or fields.get("metrics"),
        "tags": list(dict.fromkeys([*own, published.tag, TAG])),
    }


def _render_plain_card(published: PublishedFolder, *, name: str, base: str) -> str:
    """Return the body of a card for a folder without one."""
    task, path = published.task or CAUSAL_LM, name_local_path(name)
    source = base if published.kind == ADAPTER else path
    code = f"import lora_kit as lk\n\n{write_base_loading_code(source, task=task)}"
    if published.kind == ADAPTER:
        code += f"\n{write_bank_loading_code(name, path, model='base.model')}"
    return render_card(name, f"Made from {base}.", format_code(code))


def _format_files(sizes: Mapping[str, int]) -> str:
    rows = [(name, f"{size:,}") for name, size in sorted(sizes.items())]
    return f"{FILES_TITLE}\n\n{format_table(rows, head=('file', 'bytes'))}"


def _format_limits(published: PublishedFolder, *, base: str, is_licensed: bool) -> str:
    """Return what a reader must not expect, as far as the folder says."""
    lines = []
    if published.kind == ADAPTER:
        lines.append(
            f"It works on {base} only, which is loaded beside it; its faults and biases are those of that base."
        )
    else:
        lines.append(f"Its faults and biases are those of {base}, from which it was made.")
    if published.max_length:
        lines.append(f"It was trained on texts of at most {published.max_length:,} tokens; longer ones are untested.")
    measured = "are in the table above" if published.metrics else "are not recorded here"
    lines.append(f"Measured values {measured}; what was not measured is not known.")
    if not is_licensed:
        lines.append("No license is given here; the base's own terms apply.")
    return f"{LIMITS_TITLE}\n\n" + "\n".join(f"- {line}" for line in lines)
