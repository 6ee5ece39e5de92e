"""The application, and what its verbs share: parameters and exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

from cyclopts import App, Parameter

from lora_kit.cli.help_format import FilledHelp

BAD_INPUT: Final = 2
MACHINE: Final = 3
UNEXPECTED: Final = 1
DEBUG: Final = "--debug"
STRICT: Final = "--strict"
_HELP: Final = f"""Train one small adapter per task on a frozen base, swap adapters, merge one.

Example: lora-kit demo

`lora-kit VERB --help` shows what a verb takes, with an example. {DEBUG} with any verb shows the traceback of an error;
{STRICT} makes warnings errors.
"""


def _read_version() -> str:
    from lora_kit.version import __version__

    return __version__


app = App(
    name="lora-kit",
    help=_HELP,
    help_format="plaintext",
    help_formatter=FilledHelp(),
    version=_read_version,
    suppress_keyboard_interrupt=False,
    verbose=False,
)
app.register_install_completion_command(
    help="Let the Tab key complete verbs and flags in the shell: bash, zsh or fish."
)


def list_verbs() -> list[str]:
    """Return the names of all verbs, by the alphabet."""
    return sorted(name for name in app if not name.startswith("-"))


Adapters = Annotated[
    list[str],
    Parameter(
        name=["--adapter", "-a"],
        negative="",
        help="Adapter: a folder, a name in the store, or a hub id (organization/name@revision); may be repeated.",
    ),
]
_ALLOW_HELP: Final = (
    "Accept instead of rejecting, may be repeated. other-base: another base than the adapter's. extra-keys: tensors "
    "beyond its config. changed-files: files changed since they were saved. unmatched-targets: names in its config "
    "that the base does not have, without a warning."
)
Allow = Annotated[list[str] | None, Parameter(negative="", help=_ALLOW_HELP)]
MergeAllow = Annotated[
    list[str] | None,
    Parameter(
        negative="",
        help=f"{_ALLOW_HELP} untie: write tied weights separately. lost-delta: continue where rounding removes most of "
        "a delta. huge-delta: where one is above 10,000 times its weight.",
    ),
]
Store = Annotated[Path, Parameter(help="Folder in which adapters are looked up by name.")]
AsJson = Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON document instead of text.")]
Replace = Annotated[
    bool, Parameter(name=["--replace", "--force"], negative="", help="Replace the output if it exists, in one step.")
]
