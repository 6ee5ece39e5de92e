"""`doctor`."""

from __future__ import annotations

from lora_kit.cli.app import AsJson, app
from lora_kit.cli.output import print_json, print_table
from lora_kit.errors import VerificationError


@app.command
def doctor(*, json: AsJson = False) -> None:
    """Show versions and devices, and try what should work.

    Exit code 4 if something that should work here does not.
    """
    from lora_kit.doctor import examine

    found = examine()
    if json:
        print_json(found.to_json())
    else:
        print_table(("", ""), list(found.facts.items()))
        checks = [(check.name, check.state, f"{check.seconds:.2f}", check.note) for check in found.checks]
        print_table(("check", "state", "seconds", "note"), checks)
    if found.failed:
        raise VerificationError(f"does not work here: {', '.join(found.failed)}", hint="the table says why")
