"""The words that `tools.structure` looks for, and where they are right.

Keys are regular expressions of whole words, in any case. A value is what to say instead or, for exceptions, the reason.
"""

from __future__ import annotations

from typing import Final

GLOSSARY: Final = {
    r"pairs?": "LoRA weights (A, B)",
    r"slabs?": "stacked weights",
    r"(saved|trained|kept) whole": "`modules_to_save`",
    r"rows of tokens|tokens' rows": "token embeddings",
    r"stands? alone|standing alone": "without stacked weights",
    r"told|(is|are|was|were) said": "report, pass, message",
    r"said": "reported, written, result",
    r"misfits?": "mismatch",
    # A function may be called `refuse_overlap`; its docstring says "Raise MergeError if …".
    r"refus(e|es|ed|ing|al)": "Raise … if, reject, unsupported",
    r"mend(s|ed|ing)?": "fix",
    r"outlines?": "meta model",
    r"shells?": "empty model",
    r"companions?": "sidecar files",
    r"parents?": "sources",
    r"neutral": "zero, identity",
    r"likeliest": "greedy, most probable",
    r"trials?": "dry run",
    r"at the most": "at most",
    r"(is|are) none|is no such": "is invalid",
    r"(room for|has room|have room|no room)": "capacity, buffer",
    r"exams?": "GenerationTask",
    r"\w+is(e|es|ed|ing|er|ers|ations?)": "American spelling: -ize",
    r"labell(ed|ing)|modell(ed|ing)|(col|fav|behavi)our\w*|grey|centre\w*|licence": "American spelling",
}
"""The words that the project's glossary replaces."""

ORDINARY_PHRASES: Final = {
    r"pairs? of (languages|names|texts|files|numbers|values|tokens|strings)": "two things of another kind than A and B",
    r"(byte|surrogate|key|name|value|preference|prompt|question|sentence)[- ]pairs?": "the field's word for these",
    r"shell (command|script|completion)s?|(a|the|your) shell": "the program that reads commands",
    r"parent (folder|directory|module|process|class)": "the word for these of file systems, torch and processes",
    r"\w*(wise|nois(e|y|ed)|promis(e|es|ed|ing)|precise|concise|supervis(e|es|ed|ing|ion))": "always with s",
    r"\w*(rais|ris|aris|exercis|advis|revis|surpris|compris|pois|phras|prais|devis|excis)(e|es|ed|ing|er|ers)": (
        "always with s"
    ),
    r"there (is|are) (none|no such)": "it does not exist; the word is `invalid` for what exists and is wrong",
    r"expertise|premise|disguise|franchise|enterprise": "always with s",
    r"comparison|raison": "always with s",
}
"""Phrases in which such a word is right."""

ORDINARY_PLACES: Final = {
    ("lora_kit/sweeps/", r"trials?"): "optuna's word",
    ("lora_kit/cli/sweep.py", r"trials?"): "optuna's word",
    ("lora_kit/cli/follow.py", r"trials?"): "optuna's word",
    ("lora_kit/runs/", r"trials?"): "optuna's word",
    ("docs/following.md", r"trials?"): "optuna's word",
    ("docs/", r"refus(e|es|ed|ing|al)"): "plain English for what a command does",
    ("docs/sweeps.md", r"trials?"): "optuna's word",
    ("docs/cli.md", r"trials?"): "optuna's word",
    ("lora_kit/sweeps/", r"parents?"): "the process that started this one",
}
"""Words that are right in some files: beginning of the path and pattern."""

GENERATED_PAGES: Final = {
    "docs/api.md": "the first lines of docstrings, which are looked at in the code",
    "docs/cli.md": "docstrings of verbs and help of flags, likewise",
    "docs/models.md": "what each family did in its test",
    "docs/models-scan.md": "what each class did in the scan, with the errors of other libraries",
    "docs/chat-templates.md": "what each template did, with its own errors",
}
"""Pages whose tables a program writes, and what is in them; no word is looked for there."""

PARTICIPLES: Final = frozenset(
    {"begun", "borne", "bound", "built", "chosen", "done", "drawn", "fed", "found", "given", "gone", "held", "kept"}
    | {"known", "laid", "left", "lent", "lost", "made", "meant", "met", "paid", "said", "seen", "sent", "shown"}
    | {"shrunk", "spent", "taken", "taught", "told", "torn", "understood", "won", "worn", "woven", "written"}
)
"""Irregular participles; every first word in -ed counts, too."""

NOT_PARTICIPLES: Final = frozenset({"embed", "exceed", "feed", "need", "proceed", "seed", "shed", "speed", "succeed"})
"""First words in -ed that are verbs or nouns."""

PARTICIPLE_NAMES: Final = {
    "chunked_cross_entropy": "the name of an operation",
    "grouped_matmul": "the name of an operation; torch calls its own `grouped_mm`",
    "saved": "`Adapter.saved()` is public",
    "named_layers": "yields (name, layer), as torch's `named_modules` does",
    "_bound_scale_error": "to bound is a verb here",
}
"""Functions that keep such a name."""
