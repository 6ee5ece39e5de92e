"""The documents: what their text names exists, verbs and flags to files and links, and what exists is named in them."""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import lora_kit as lk
from lora_kit import errors
from lora_kit.bank.peft_bridge.adopt import AdoptedBank
from lora_kit.sweeps.space import is_objective_key, recipe_keys
from tests.support import pages
from tests.support.pages import PAGES, ROOT, name_of
from tools import docs_reference as reference
from tools.docs_reference import arguments, verbs

OTHER_PROGRAMS = {"llama-server", "pip", "pytest", "git", "torchrun"}
OTHER_FLAGS = {"--max-loras", "--max-cpu-loras", "--lora-modules"}
"""Of vLLM."""
ATTRIBUTES = {"peft_model", "cache", "model", "dtype"}
"""Attributes that a bank gets when it is made."""


# What is named exists


def flags_in(text: str) -> list[str]:
    return re.findall(r"(?<![\w-])--[a-z][\w.-]*", text)


@functools.cache
def known_flags(verb: str | None = None) -> frozenset[str]:
    """The flags of a verb, or of all; those of `train` and `sweep` are the keys of recipes, too."""
    found = {name for one in ([verb] if verb else verbs()) for each in arguments(one) for name in each.names}
    found |= {"--help", "--debug", "--strict", "--version", "--install-completion"}
    found |= OTHER_FLAGS if verb is None else set()
    if verb in (None, "train", "sweep"):
        found |= {f"--{name}" for name in (*recipe_keys(), "dry-run", "json", "replace")}
    return frozenset(found)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_verbs_and_flags_in_the_text_exist(page: Path) -> None:
    wrong = []
    for span in pages.spans(page):
        words = span.removeprefix("lora-kit ").split()
        verb = words[0] if words[0] in verbs() else None
        if span.startswith("lora-kit ") and verb is None and not words[0].startswith("-"):
            wrong.append(span)
        if verb is None and words[0] in OTHER_PROGRAMS:
            continue
        known = known_flags(verb) if span.startswith("lora-kit ") else known_flags()
        wrong += [f"{span}: {flag}" for flag in flags_in(span) if flag not in known]
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_recipe_keys_in_the_text_exist(page: Path) -> None:
    named = {
        match[0]
        for span in pages.spans(page)
        if (match := re.match(r"(data|lora|train)\.(?!jsonl)[a-z_]+(?=$|:)", span))
    }
    unknown = named - set(recipe_keys())
    if unknown:
        pytest.importorskip("trl", reason="keys of an objective are TRL's")
    assert not {key for key in unknown if not is_objective_key(key)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_of_the_library_in_the_text_exist(page: Path) -> None:
    wrong = []
    for span in pages.spans(page):
        for root, path in re.findall(r"(?<![\w./])(lk|bank|lora_kit)\.([A-Za-z_][\w.]*)", span):
            if not path.endswith((".json", ".py")) and span != "lora_kit.json" and not exists(root, path.rstrip(".")):
                wrong.append(f"{root}.{path}")
    assert not wrong


def exists(root: str, path: str) -> bool:
    try:
        found: Any = {"lk": lk, "lora_kit": lk, "bank": AdoptedBank}[root]
        for name in path.split("."):
            if name == "json":  # lora_kit.json
                return True
            found = getattr(found, name, None) or importlib.import_module(f"{found.__name__}.{name}")
    except (ImportError, AttributeError):
        return name in ATTRIBUTES
    return True


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_errors_and_files_in_the_text_exist(page: Path) -> None:
    named = {name for span in pages.spans(page) for name in re.findall(r"\b[A-Z]\w+Error\b", span)}
    assert not {name for name in named if not hasattr(errors, name) and not hasattr(builtins, name)}
    files = [span for span in pages.spans(page) if re.fullmatch(r"(lora_kit|tests|benchmarks|docs)/[\w./-]+", span)]
    assert not [file for file in files if not (ROOT / file).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in pages.links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if re.match(r"https?:", link):
            continue
        if not target.exists() or (anchor and anchor not in pages.anchors(target)):
            dead.append(link)
    assert not dead


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in pages.links(index)}
    assert not {page for page in (ROOT / "docs").rglob("*.md") if page != index} - linked


def test_each_question_has_an_answer_and_a_page() -> None:
    questions = (ROOT / "docs" / "questions.md").read_text("utf-8").split("\n## ")[1:]
    assert len(questions) >= 20
    assert not [
        one for one in questions if not re.fullmatch(r"[^\n]+\?[^\n]*\n\n.{40,}?\n\nMore: \[.+\n*", one, re.DOTALL)
    ]
    asked = [int(number) for number in re.findall(r"Asked in (\d+) threads", "\n".join(questions))]
    assert asked == sorted(asked, reverse=True)
    assert asked == [one.count("/issues/") for one in questions]


# What exists is named


def test_every_variable_of_the_environment_is_explained() -> None:
    sources = "\n".join(path.read_text("utf-8") for path in (ROOT / "lora_kit").rglob("*.py"))
    assert not [
        name for name in sorted(set(re.findall(r"LORA_KIT_[A-Z_]+", sources))) if name not in written_by_people()
    ]


def written_by_people() -> str:
    made = {ROOT / "docs" / name for name in reference.PAGES}
    return "\n".join(page.read_text("utf-8") for page in PAGES if page not in made)


def test_every_public_name_is_shown_to_people() -> None:
    text = written_by_people()
    missing = [name for name in lk.__all__ if not re.search(rf"\b(lk\.|lora_kit\.)?{name}\b", text)]
    assert missing in ([], ["__version__"])


def test_every_verb_is_shown_to_people() -> None:
    text = written_by_people()
    assert not [verb for verb in verbs() if f"lora-kit {verb}" not in text]


def test_every_error_is_explained() -> None:
    page = ROOT / "docs" / "errors.md"
    family = {name for name, kind in vars(errors).items()
              if inspect.isclass(kind) and issubclass(kind, errors.LoraKitError)}  # fmt: skip
    explained = re.findall(r"^##+ (\w+Error)$", pages.prose(page), re.MULTILINE)
    assert sorted(explained) == sorted(family - {"LoraKitError"})


def test_what_errors_are_said_to_say_stands_in_the_code() -> None:
    sources = [path.read_text("utf-8") for path in (ROOT / "lora_kit").rglob("*.py")]
    texts = [node.value for source in sources for node in ast.walk(ast.parse(source))
             if isinstance(node, ast.Constant) and isinstance(node.value, str)]  # fmt: skip
    page = (ROOT / "docs" / "errors.md").read_text("utf-8")
    said = [span for cell in re.findall(r"^\| (`.+?) \|", page, re.MULTILINE) for span in re.findall("`([^`]+)`", cell)]
    parts = {part.strip(" ,:;") for span in said for part in span.split("…")} - {""}
    assert len(parts) > 40
    assert not [part for part in sorted(parts) if not any(part in text for text in texts)]


@pytest.mark.parametrize("name", reference.PAGES)
def test_reference_pages_are_fresh(name: str) -> None:
    written = (ROOT / "docs" / name).read_text("utf-8")
    assert written == reference.PAGES[name](), "stale: run `python -m tools.docs_reference`"


def test_targets_and_extras_in_the_documents_exist() -> None:
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert (
        not {name for name in re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", text, re.MULTILINE) for name in name}
        - made
        - {""}
    )
    assert not {name for names in re.findall(r"lora-kit\[([\w,]+)\]", text) for name in names.split(",")} - set(extras)
