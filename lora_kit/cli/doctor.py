"""`doctor`."""

from __future__ import annotations

from lora_kit.cli.app import AsJson, app
from lora_kit.cli.output import print_json, print_table
from lora_kit.errors import VerificationError


@app.command
def doctor(*, json: AsJson = False) -> None:
    """Show versions and devices, and test what should work on this machine.

    Exit code 4 if a test fails.

    Example: lora-kit doctor
    """
    from lora_kit.doctor import examine

    report = examine()
    if json:
        print_json(report.to_json())
    else:
        print_table(("", ""), list(report.facts.items()))
        checks = [(check.name, check.state, f"{check.seconds:.2f}", check.note) for check in report.checks]
        print_table(("check", "state", "seconds", "note"), checks)
    if report.failed:
        raise VerificationError(f"does not work here: {', '.join(report.failed)}", hint="the table has the reasons")
