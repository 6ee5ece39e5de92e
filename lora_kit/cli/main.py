"""One command from its arguments to its exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from cyclopts import CycloptsError

from lora_kit.cli.app import BAD_INPUT, DEBUG, MACHINE, UNEXPECTED, app
from lora_kit.cli.output import listing, one_line
from lora_kit.cli.process import logged, steady_streams, terminable
from lora_kit.errors import LoraKitError
from lora_kit.io.text import harmless


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; an error is one line on stderr.

    Args:
        argv: the arguments after the program's name; those of the process by default.
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    debug = _take_flag(tokens, DEBUG)
    with steady_streams(), terminable(), logged(debug=debug):
        try:
            app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
            sys.stdout.flush()
        except KeyboardInterrupt:
            return _fail("interrupted", 128 + signal.SIGINT)
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else UNEXPECTED if error.code else 0
        except CycloptsError as error:
            return _fail(one_line(str(error)), BAD_INPUT, hint="lora-kit --help")
        except Exception as error:
            if debug:
                _traceback()
            return _fail(*_explained(error, debug=debug))
    return 0


def _explained(error: Exception, *, debug: bool) -> tuple[str, int]:
    """The line and the exit code of an error."""
    if isinstance(error, LoraKitError):
        return str(error), error.exit_code
    code = MACHINE if isinstance(error, (MemoryError, OSError)) or "OutOfMemory" in type(error).__name__ else UNEXPECTED
    again = "" if debug else f" (run again with {DEBUG})"
    return f"{type(error).__name__}: {one_line(str(error))}{again}", code


def _fail(message: str, code: int, *, hint: str = "") -> int:
    line = f"error: {harmless(listing(message))}" + (f" ({hint})" if hint else "")
    print(line, file=sys.stderr)
    return code


def _traceback() -> None:
    import traceback

    print(harmless(traceback.format_exc()), file=sys.stderr, end="")


def _take_flag(tokens: list[str], flag: str) -> bool:
    """Takes a flag out of the tokens before `--`; says whether it was there."""
    own = tokens[: tokens.index("--")] if "--" in tokens else tokens
    present = flag in own
    tokens[: len(own)] = [token for token in own if token != flag]
    return present
