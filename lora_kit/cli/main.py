"""One command from its arguments to its exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from cyclopts import CycloptsError, UnknownCommandError, UnknownOptionError

from lora_kit.cli.app import BAD_INPUT, DEBUG, MACHINE, STRICT, UNEXPECTED, app, list_verbs
from lora_kit.cli.output import join_words, print_notice
from lora_kit.cli.process import collect_garbage_less_often, handle_sigterm, log_to_stderr, protect_streams
from lora_kit.cpu_threads import choose_cpu_threads
from lora_kit.errors import REPORTED_ELSEWHERE, LoraKitError, suggest_nearest
from lora_kit.io.text import escape_for_terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; an error is one line on stderr, on a terminal a paragraph.

    Args:
        argv: the arguments after the program's name; those of the process by default.
    """
    choose_cpu_threads()
    tokens = list(sys.argv[1:] if argv is None else argv)
    debug, strict = _take_flag(tokens, DEBUG), _take_flag(tokens, STRICT)
    with collect_garbage_less_often(), protect_streams(), handle_sigterm(), log_to_stderr(debug=debug, strict=strict):
        try:
            app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
            sys.stdout.flush()
        except KeyboardInterrupt as error:
            return _fail("interrupted", 128 + signal.SIGINT, error=error)
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else UNEXPECTED if error.code else 0
        except CycloptsError as error:
            message, hint = _explain_usage(error)
            return _fail(message, BAD_INPUT, hint=hint)
        except Exception as error:
            if debug:
                _print_traceback()
            message, hint, code = _explain_error(error, debug=debug)
            return _fail(message, code, hint=hint, error=error)
    return 0


def _explain_usage(error: CycloptsError) -> tuple[str, str]:
    """Return what is wrong with the words of a command, and what to do about it: the nearest word first."""
    more = " ".join(("lora-kit", *(error.command_chain or ()), "--help"))
    if isinstance(error, UnknownCommandError):
        word = (error.unused_tokens or [""])[0]
        return f"no verb is called {word!r}", suggest_nearest(word, list_verbs()) or more
    if isinstance(error, UnknownOptionError):
        word = error.token.keyword or error.token.value
        known = [name for argument in error.argument_collection for name in argument.names if argument.parse]
        return f"no flag is called {word!r}", suggest_nearest(word, known) or more
    return join_words(str(error)), more


def _explain_error(error: Exception, *, debug: bool) -> tuple[str, str, int]:
    """Return the message, the hint and the exit code of an error."""
    if isinstance(error, LoraKitError):
        return error.message, error.hint, error.exit_code
    is_memory = "OutOfMemory" in type(error).__name__ or "DefaultCPUAllocator" in str(error)
    code = MACHINE if isinstance(error, (MemoryError, OSError)) or is_memory else UNEXPECTED
    again = "" if debug else f"run again with {DEBUG}"
    return f"{type(error).__name__}: {join_words(str(error))}", again, code


def _fail(message: str, code: int, *, hint: str = "", error: BaseException | None = None) -> int:
    """Print an error on stderr, unless another process prints it, and return its exit code."""
    if not getattr(error, REPORTED_ELSEWHERE, False):
        print_notice("error", message, hint=hint)
    return code


def _print_traceback() -> None:
    import traceback

    print(escape_for_terminal(traceback.format_exc()), file=sys.stderr, end="")


def _take_flag(tokens: list[str], flag: str) -> bool:
    """Remove a flag from the tokens before `--` and return whether it was there."""
    own = tokens[: tokens.index("--")] if "--" in tokens else tokens
    present = flag in own
    tokens[: len(own)] = [token for token in own if token != flag]
    return present
