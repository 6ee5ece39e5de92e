"""Columns that people name otherwise: which of them are probably the text, the label, the prompt and the completion."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

_WORDS: Final[Mapping[str, frozenset[str]]] = {
    "prompt": frozenset({"ask", "input", "instruction", "prompt", "query", "question", "source", "user"}),
    "completion": frozenset({"answer", "assistant", "completion", "output", "reply", "response", "target"}),
    "text": frozenset(
        {"body", "comment", "complaint", "content", "description", "email", "feedback", "mail", "message", "post"}
        | {"review", "sentence", "subject", "text", "ticket", "tweet", "utterance"}
    ),
    "label": frozenset(
        {"category", "class", "department", "intent", "label", "mood", "polarity", "rating", "sentiment", "stars"}
        | {"tag", "team", "topic", "type"}
    ),
}
"""Words in the names of columns, by what such a column mostly holds."""
_PAIRS: Final = (("prompt", "completion"), ("text", "label"))


def suggest_renames(path: Path, names: Iterable[str]) -> str | None:
    """Return the command that gives columns the names of a layout; None where the names do not say which these are."""
    columns = list(names)
    for pair in _PAIRS:
        found = [[name for name in columns if _WORDS[role] & _split_words(name)] for role in pair]
        if all(len(candidates) == 1 for candidates in found) and found[0] != found[1]:
            chosen = [(candidates[0], role) for candidates, role in zip(found, pair, strict=True)]
            renames = shlex.join(f"{old}={new}" for old, new in chosen if old != new)
            return f"lora-kit prepare {shlex.quote(str(path))} --rename {renames}"
    return None


def _split_words(name: str) -> set[str]:
    """Return the words of a name in lower case: `{"review", "text"}` for `ReviewText` and ` review_text `."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}
