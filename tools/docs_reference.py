"""docs/cli.md and docs/api.md, from the application and from docstrings.

`python -m tools.docs_reference` writes them.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import lora_kit
from lora_kit.cli.app import app
from lora_kit.cli.help_format import EXAMPLE
from lora_kit.cli.verb_groups import VERB_GROUPS

DOCS: Final = Path(__file__).resolve().parents[1] / "docs"
MADE: Final = "Made by `python -m tools.docs_reference`; a test fails when it is stale."
CLASSES: Final = (
    ("An adapter", "lora_kit.adapter.adapter.Adapter"),
    ("A config", "lora_kit.config.lora_config.LoraConfig"),
    ("A bank", "lora_kit.bank.bank.AdapterBank"),
    ("The bank of a PeftModel", "lora_kit.bank.peft_bridge.adopt.AdoptedBank"),
    ("A base", "lora_kit.models.loading.Base"),
)
"""Whose methods are listed one by one."""
FURTHER: Final = {
    "lora_kit.training.recipe.load": ("load_recipe",),
    "lora_kit.training.recipe.recipe": ("Recipe",),
    "lora_kit.training.plan.plan": ("plan",),
    "lora_kit.training.results": ("TrainReport", "TrainPlan"),
    "lora_kit.sweeps.sweep_report": ("SweepReport",),
    "lora_kit.data": ("prepare", "read_rows", "encode", "chat_template", "Collator", "Preparation"),
    "lora_kit.evaluation.metrics": ("METRICS",),
    "lora_kit.evaluation.eval_report": ("EvalReport",),
    "lora_kit.evaluation.measure": ("Evaluation",),
    "lora_kit.evaluation.prediction": ("Prediction", "Entity"),
    "lora_kit.generation.generate": ("generate", "Generation"),
    "lora_kit.generation.decoding": ("Sampling",),
    "lora_kit.adapter.store": ("list_adapters", "find_adapter"),
    "lora_kit.adapter.inspect": ("inspect", "Inspection"),
    "lora_kit.merging.merge_report": ("MergeReport",),
    "lora_kit.algebra.compare": ("compare", "Comparison"),
    "lora_kit.exporters.export": ("check", "Verdict", "Export"),
    "lora_kit.adapter.conversion.convert": ("convert",),
    "lora_kit.adapter.signing": ("sign", "verify"),
    "lora_kit.targets.coverage": ("Coverage",),
    "lora_kit.targets.fingerprint": ("fingerprint",),
    "lora_kit.doctor": ("examine",),
}
"""What people use beside the names of the package, by module."""
_ABOUT: Final = (
    "`--help` with any verb says the same as here, with `train` the keys of a recipe too; `--debug` shows the",
    "traceback of an error, `--strict` makes warnings errors. What exit codes and errors mean: [errors](errors.md).",
    "",
    "`lora-kit --install-completion` lets the Tab key complete verbs and flags in bash, zsh and fish, once the shell",
    "is started anew.",
    "",
    "`train` and `sweep` take every [recipe key](recipes.md) as a flag as well: `--lora.r 8`.",
    "",
    "Tables fit the width of the terminal (`COLUMNS`, where it is set). Where that is too narrow, the column that",
    "matters least is left out, or each row becomes a block of lines; `--json` has all of it, as one JSON document.",
)
"""What docs/cli.md says of all verbs."""
_PROPERTIES: Final = (property, functools.cached_property)


# The command line


def verbs() -> dict[str, Any]:
    """Every verb with its own application, in the order of the alphabet."""
    return {name: app[name] for name in sorted(app) if not name.startswith("-")}


@functools.cache
def arguments(verb: str) -> list[Any]:
    """What a verb takes and shows, positional arguments first."""
    shown = [one for one in app[verb].assemble_argument_collection(parse_docstring=True) if one.show]
    return sorted(shown, key=lambda one: one.index is None)


def names_of(argument: Any) -> list[str]:
    """What an argument goes by: `--out`, or `ADAPTER` where its place says what it is."""
    if argument.index is not None:
        return [argument.name.strip("-").upper()]
    return [name for name in argument.names if name not in argument.negatives]


def cli_page() -> str:
    """docs/cli.md."""
    lines, known = ["# The command line", "", MADE, "", "| verb | |", "|---|---|"], verbs()
    for title, names in VERB_GROUPS.items():
        lines += [f"| **{title}** | |"]
        lines += [f"| [`{name}`](#{name}) | {_first(known[name].help)} |" for name in names if name in known]
    lines += ["", *_ABOUT]
    for verb in known:
        lines += _verb(verb)
    return "\n".join(lines) + "\n"


def _verb(verb: str) -> Iterator[str]:
    one, taken = app[verb], arguments(verb)
    words = [name if each.index is not None else f"{name} {name.strip('-').upper()}"
             for each in taken if each.required for name in names_of(each)[:1]]  # fmt: skip
    usage = (one.usage or "").removeprefix("Usage: ") or " ".join(["lora-kit", verb, *words, "[OPTIONS]"])
    yield from ("", f"## {verb}", "", "```text", usage.strip(), "```", "")
    yield from _description(one.help)
    rows = [f"| {_names(each)} | {_cell(each.parameter.help)} | {_default(each)} |" for each in taken]
    yield from ("", "| | | default |", "|---|---|---|", *rows) if rows else ()


def _names(argument: Any) -> str:
    return ", ".join(f"`{name}`" for name in names_of(argument))


def _default(argument: Any) -> str:
    if argument.required:
        return "needed"
    default = argument.field_info.default
    return "" if default is None or default is False else f"`{default}`"


def _description(text: str) -> Iterator[str]:
    """A docstring up to its sections."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(text))
    for paragraph in paragraphs:
        if paragraph.startswith(("Args:", "Raises:", "Returns:")):
            return
        if paragraph is not paragraphs[0]:
            yield ""
        words = " ".join(paragraph.split())
        yield f"{EXAMPLE}`{words.removeprefix(EXAMPLE)}`" if words.startswith(EXAMPLE) else words


# Python


def api_page() -> str:
    """docs/api.md."""
    lines = [
        "# Python",
        "",
        MADE,
        "",
        "One line each; `help(lk.attach)` says all of it: arguments, shapes, what is raised.",
        "",
    ]
    lines += ["## `import lora_kit as lk`", "", "| | |", "|---|---|"]
    lines += [_row(f"lk.{name}", getattr(lora_kit, name)) for name in sorted(set(lora_kit.__all__) - {"__version__"})]
    lines += ["", "`lk.LoraKitError` is the root of [the errors](errors.md)."]
    for title, path in CLASSES:
        lines += _class(title, path)
    lines += ["", "## Further modules"]
    for module, names in FURTHER.items():
        home = importlib.import_module(module)
        lines += ["", f"### `{module}`", "", "| | |", "|---|---|"]
        lines += [_row(name, getattr(home, name)) for name in names]
    return "\n".join(lines) + "\n"


def _class(title: str, path: str) -> Iterator[str]:
    module, _, name = path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    yield from ("", f"## {title}: `{name}`", "", _first(kind.__doc__), "", "| | |", "|---|---|")
    yield from (f"| `{names}` | {_cell(told)} |" for names, told in _attributes(inspect.getdoc(kind) or ""))
    for member, value in vars(kind).items():
        if not member.startswith("_") and (inspect.isroutine(value) or isinstance(value, _PROPERTIES)):
            yield _row(member, value)


def _attributes(doc: str) -> list[tuple[str, str]]:
    """The `Attributes` of a docstring: names and what is said of them."""
    section = re.search(r"^Attributes:\n((?:    .*\n|\n)+)", doc + "\n", re.MULTILINE)
    told = re.sub(r"\n {8,}", " ", section[1]) if section else ""
    return re.findall(r"^    ([\w, ]+): (.+)$", told, re.MULTILINE)


def _row(name: str, value: Any) -> str:
    plain = getattr(value, "__func__", value)
    documented = inspect.isroutine(plain) or inspect.isclass(plain) or isinstance(plain, (ModuleType, *_PROPERTIES))
    return f"| `{name}{_signature(plain)}` | {_cell(_first(inspect.getdoc(plain) if documented else ''))} |"


def _signature(value: Any) -> str:
    """The names of a function's arguments, `=…` where one may be left out."""
    if isinstance(value, _PROPERTIES) or not inspect.isroutine(value):
        return ""
    parts, starred = [], False
    for one in inspect.signature(value).parameters.values():
        if one.name in ("self", "cls"):
            continue
        if one.kind is one.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        parts.append(one.name if one.default is one.empty else f"{one.name}=…")
    return f"({', '.join(parts)})"


def _first(text: str | None) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(re.split(r"\n\s*\n", inspect.cleandoc(text or ""))[0].split())


def _cell(text: str | None) -> str:
    """Return text as a cell of a table: one line, in which `|` and `<` outside of code mean themselves."""
    line = " ".join((text or "").split()).replace("|", "\\|")
    return "`".join(part if number % 2 else part.replace("<", "&lt;") for number, part in enumerate(line.split("`")))


PAGES: Final = {"cli.md": cli_page, "api.md": api_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), "utf-8")
