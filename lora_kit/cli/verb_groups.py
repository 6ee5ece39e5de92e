"""The verbs by what people do with them, in the order in which `--help` lists them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cyclopts import App, Group

VERB_GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "Train": ("init", "demo", "plan", "prepare", "preview", "train", "follow", "runs", "keep", "sweep"),
    "Ask and measure": ("predict", "generate", "chat", "eval"),
    "Ship": ("merge", "export", "check", "serve", "parity", "push"),
    "Many adapters": ("list", "inspect", "compare", "combine", "resize", "extract", "convert"),
    "Look after": ("sign", "verify", "doctor"),
}
"""The verbs of each group."""
OPTIONS: Final = "Options"
"""The group of the flags that stand without a verb."""


def group_verbs(app: App) -> None:
    """Give every verb of an application its group and its place in it."""
    for place, (title, verbs) in enumerate(VERB_GROUPS.items()):
        group = Group(title, sort_key=place)
        for order, verb in enumerate(verbs):
            if verb in app:
                app[verb].group, app[verb].sort_key = group, order
    options = Group(OPTIONS, sort_key=len(VERB_GROUPS))
    for flag in (name for name in app if name.startswith("-")):
        app[flag].group = options
