"""The command line: verbs of a few lines, each importing what it needs when it runs.

Exit codes: 0 good, 2 what was given is wrong, 3 the machine, 4 a verification failed, 130 on SIGINT, 143 on SIGTERM.
"""

from __future__ import annotations

import contextlib
import json as jsonlib
import os
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TextIO

from cyclopts import App, CycloptsError, Parameter

from lora_kit.errors import ConfigError, LoraKitError, VerificationError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from lora_kit.generate import Generation
    from lora_kit.inspect import Inspection
    from lora_kit.merge import MergeReport
    from lora_kit.train import Recipe, TrainReport

BAD_INPUT: Final = 2
MACHINE: Final = 3
UNEXPECTED: Final = 1
_DEBUG: Final = "--debug"
_TELLING: Final = ("perplexity", "accuracy", "loss", "train_loss", "steps")
_PIPE_WIDTH: Final = 200
"""Columns of a table where there is no terminal to ask."""


def _version() -> str:
    from lora_kit import __version__

    return __version__


app = App(
    name="lora-kit",
    help="Train one small adapter per task on a frozen base, swap adapters, merge one.",
    help_epilogue=f"{_DEBUG} with any command shows the traceback of an error.",
    help_format="plaintext",
    help_formatter="plain",
    version=_version,
    suppress_keyboard_interrupt=False,
    verbose=False,
)

Adapters = Annotated[
    list[str],
    Parameter(
        name=["--adapter", "-a"], negative="", help="Adapter: a folder, or a name in the store; may be repeated."
    ),
]
Store = Annotated[Path, Parameter(help="The folder in which adapters are looked up by name.")]
AsJson = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON instead of tables.")]
Replace = Annotated[bool, Parameter(negative="", help="Replace the output if it exists.")]
ADAPTERS: Final = Path("adapters")


@app.command
def demo(*, out: Path = Path("runs/demo"), seed: int = 0) -> None:
    """Train three adapters, compare, swap and merge them.

    Args:
        out: Folder for what it makes.
        seed: Seed of data and training.
    """
    from lora_kit.demo import run

    run(out=out, seed=seed)


@app.command(usage="Usage: lora-kit train RECIPE [--KEY VALUE ...]")
def train(
    recipe: Path,
    /,
    *flags: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
) -> None:
    """Train an adapter from a recipe; flags win over it.

    The recipe is YAML or TOML. Any key of it is a flag: --base, --out, --lora.r 8, --train.learning_rate 1e-3,
    --data.train rows.jsonl; --replace replaces an adapter that is there.

    Args:
        recipe: The recipe's file.
    """
    from lora_kit.train import load_recipe
    from lora_kit.train import train as run

    values = _dotted(flags)
    replace = values.pop("replace", "false")
    if replace not in ("true", "false"):
        raise ConfigError(f"--replace takes no value; {replace!r} was given")
    wanted = load_recipe(recipe, overrides=values)
    print(_plan(wanted), flush=True)
    with _told():
        report = run(wanted, replace=replace == "true")
    _print_table(("", ""), _train_facts(report))


@app.command
def generate(
    *,
    prompt: str,
    adapter: Adapters | None = None,
    base: str | None = None,
    compare: Annotated[bool, Parameter(negative="")] = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    raw: Annotated[bool, Parameter(negative="")] = False,
    store: Store = ADAPTERS,
) -> None:
    """Answer a prompt with adapters, side by side.

    All rows are one batch.

    Args:
        prompt: What is asked.
        base: Base model: hub id, local folder or kit-base; by default the one the adapters name.
        compare: Show what the base alone writes as well.
        max_new_tokens: Most tokens to write.
        temperature: 0 takes the likeliest token each time; above 0 samples.
        top_p: Sample from the likeliest tokens that make up this share.
        seed: Seed of the sampling.
        raw: Give the model the prompt as it is, without what the adapter's training put after prompts.
    """
    from lora_kit.generate import BASE_ROW, Sampling
    from lora_kit.generate import generate as run
    from lora_kit.inspect import base_of

    rows: list[str | None] = [*([None] if compare or not adapter else []), *(adapter or [])]
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    screen = _Screen([BASE_ROW if row is None else Path(row).name for row in rows])
    with screen.growing() as on_text:
        results = run(
            base or base_of(adapter or [], store=store),
            rows,
            prompt,
            sampling=sampling,
            template="raw" if raw else "adapter",
            store=store,
            on_text=on_text,
        )
    screen.finish(results)


@app.command(name="list")
def list_(store: Path = ADAPTERS, /, *, json: AsJson = False) -> None:
    """List the adapters of a store, broken ones too.

    Args:
        store: Folder that holds one folder per adapter.
    """
    from lora_kit.inspect import list_adapters

    found = list_adapters(store)
    if json:
        _print_json([summary.to_json() for summary in found])
        return
    rows = [
        (
            summary.name,
            _number(summary.rank),
            _number(summary.alpha),
            ", ".join(summary.targets),
            summary.base or "",
            _size(summary.bytes),
            _metrics(summary.metrics),
            summary.digest[:12],
            f"broken: {summary.problem}" if summary.problem else "good",
        )
        for summary in found
    ]
    _print_table(("adapter", "rank", "alpha", "targets", "base", "size", "metrics", "digest", "state"), rows)
    if not found:
        _console().print(f"no adapters in {harmless(str(store))}")


@app.command
def inspect(adapter: str, /, *, store: Store = ADAPTERS, json: AsJson = False) -> None:
    """Show what an adapter is made of.

    Layers, ranks, norms of the deltas, size, base, record.

    Args:
        adapter: A folder, or a name in the store.
    """
    from lora_kit.inspect import inspect as run

    found = run(adapter, store=store)
    if json:
        _print_json(found.to_json())
        return
    _print_table(("", ""), _facts(found))
    _print_table(
        ("layer", "kind", "shape", "rank", "scaling", "‖delta‖"),
        [
            (
                layer.path,
                layer.kind,
                "×".join(map(str, layer.shape)),
                str(layer.rank),
                f"{layer.scaling:g}",
                f"{layer.norm:.4g}",
            )
            for layer in found.layers
        ],
    )


@app.command
def merge(
    *,
    adapter: str,
    out: Path,
    base: str | None = None,
    dtype: str | None = None,
    replace: Replace = False,
    allow: Annotated[
        list[str] | None, Parameter(negative="", help="other-base: merge into another base than the adapter's.")
    ] = None,
    store: Store = ADAPTERS,
    json: AsJson = False,
) -> None:
    """Fold an adapter into its base; write a model folder.

    What was written is read back and verified before the folder appears.

    Args:
        adapter: A folder, or a name in the store.
        out: The folder to write.
        base: Base model: hub id, local folder or kit-base; by default the one the adapter names.
        dtype: float32, bfloat16 or float16; by default that of the base.
    """
    from lora_kit.inspect import base_of, find_adapter
    from lora_kit.merge import merge as run

    folder = find_adapter(adapter, store=store)
    report = run(base or base_of([adapter], store=store), folder, out, dtype=dtype, replace=replace, allow=allow or ())
    if json:
        _print_json(report.to_json())
        return
    _print_table(("", ""), _merge_facts(report))


@app.command
def doctor(*, json: AsJson = False) -> None:
    """Show versions and devices, and try what should work.

    Exit code 4 if something that should work here does not.
    """
    from lora_kit.doctor import examine

    found = examine()
    if json:
        _print_json(found.to_json())
    else:
        _print_table(("", ""), list(found.facts.items()))
        checks = [(check.name, check.state, f"{check.seconds:.2f}", check.note) for check in found.checks]
        _print_table(("check", "state", "seconds", "note"), checks)
    if found.failed:
        raise VerificationError(f"does not work here: {', '.join(found.failed)}", hint="the table says why")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; an error is one line on stderr.

    Args:
        argv: the arguments after the program's name; those of the process by default.
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    debug = _take_flag(tokens, _DEBUG)
    with _steady_streams(), _terminable(), _logged(debug=debug):
        try:
            app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
            sys.stdout.flush()
        except KeyboardInterrupt:
            return _fail("interrupted", 128 + signal.SIGINT)
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else UNEXPECTED if error.code else 0
        except CycloptsError as error:
            return _fail(_one_line(str(error)), BAD_INPUT, hint="lora-kit --help")
        except Exception as error:
            if debug:
                _traceback()
            return _fail(*_explained(error, debug=debug))
    return 0


def harmless(text: str) -> str:
    r"""Text with everything that could steer a terminal escaped: `\x1b`, `\u202e`; line breaks and tabs stay.

    Names in files that others wrote end up in messages and tables; an escape sequence in one must not act.
    """
    return "".join(c if c in "\n\t" or not _steers(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def _steers(character: str) -> bool:
    # Control characters, surrogates, unassigned ones, and marks that reorder text; joiners inside emoji are harmless.
    category = unicodedata.category(character)
    return category in ("Cc", "Cs", "Co", "Cn") or (category == "Cf" and character not in "\u200c\u200d")


def _explained(error: Exception, *, debug: bool) -> tuple[str, int]:
    """The line and the exit code of an error."""
    if isinstance(error, LoraKitError):
        return str(error), error.exit_code
    code = MACHINE if isinstance(error, (MemoryError, OSError)) or "OutOfMemory" in type(error).__name__ else UNEXPECTED
    again = "" if debug else f" (run again with {_DEBUG})"
    return f"{type(error).__name__}: {_one_line(str(error))}{again}", code


def _fail(message: str, code: int, *, hint: str = "") -> int:
    line = f"error: {harmless(message)}" + (f" ({hint})" if hint else "")
    print(line.replace("\n", "\n  "), file=sys.stderr)
    return code


def _traceback() -> None:
    import traceback

    print(harmless(traceback.format_exc()), file=sys.stderr, end="")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _take_flag(tokens: list[str], flag: str) -> bool:
    """Takes a flag out of the tokens before `--`; says whether it was there."""
    own = tokens[: tokens.index("--")] if "--" in tokens else tokens
    present = flag in own
    tokens[: len(own)] = [token for token in own if token != flag]
    return present


def _dotted(flags: Sequence[str]) -> dict[str, str]:
    """`--lora.r 8 --out=x --replace` as `{"lora.r": "8", "out": "x", "replace": "true"}`.

    Dashes in keys count as underscores.

    Raises:
        ConfigError: a value without a key.
    """
    found: dict[str, str] = {}
    waiting = list(flags)
    while waiting:
        token = waiting.pop(0)
        if not token.startswith("--") or token == "--":
            raise ConfigError(
                f"{token!r} was given where a flag such as --lora.r was expected", hint="lora-kit train --help"
            )
        key, equals, value = token[2:].partition("=")
        if not equals:
            value = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "true"
        found[key.replace("-", "_")] = value
    return found


class _Steady:
    """A text stream that goes on, into nothing, once nobody reads it any more.

    A command whose reader has left (`| head -1`) finishes its work instead of dying in the middle of it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            # A locale that cannot show a character must not stop a command either.
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._whoever_reads():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._whoever_reads():
            self._stream.flush()

    @contextlib.contextmanager
    def _whoever_reads(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # What is buffered would fail again at exit: the descriptor itself is led away.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def _steady_streams() -> Iterator[None]:
    """Standard output and error that cannot make a command fail: closed, broken, or in a narrow encoding."""
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        steady = [_Steady(stream or stack.enter_context(open(os.devnull, "w"))) for stream in before]
        sys.stdout, sys.stderr = steady
        try:
            yield
        finally:
            for stream in steady:
                # What could not be written was an error above, or concerns an error that is on its way already.
                with contextlib.suppress(OSError):
                    stream.flush()
            sys.stdout, sys.stderr = before


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a command as SIGINT does: through its clean-up, with exit code 143."""

    def stop(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread, where signals are none of ours
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _logged(*, debug: bool) -> Iterator[None]:
    """Warnings of the library as lines on stderr; with `--debug` everything it logs."""
    import logging

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            grade = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
            print(grade + harmless(record.getMessage()), file=sys.stderr)

    logger, handler = logging.getLogger("lora_kit"), Lines()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Progress in lines where there is no terminal for a bar."""
    import logging

    logger = logging.getLogger("lora_kit")
    before = logger.level
    if not sys.stderr.isatty():
        logger.setLevel(min(before, logging.INFO))
    try:
        yield
    finally:
        logger.setLevel(before)


def _console() -> Console:
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPE_WIDTH
    return console


def _print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A table without lines around it; without a header where that is all empty; nothing where there are no rows."""
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(header))
    for title in header:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(Text(harmless(cell)) for cell in row))
    console = _console()
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as text:
        console.print(table)
    print("\n".join(line.rstrip() for line in text.get().splitlines()))


def _print_json(value: Any) -> None:
    print(jsonlib.dumps(value, indent=2))


class _Screen:
    """Rows of text that grow: panels on a terminal; elsewhere one row as it comes, several as blocks at the end."""

    def __init__(self, names: Sequence[str]) -> None:
        self._console = _console()
        self._names = list(names)
        self._texts = [""] * len(names)
        self._written = ""
        self._live: Any = None

    @contextlib.contextmanager
    def growing(self) -> Iterator[Callable[[int, str], None]]:
        if not self._console.is_terminal:
            yield self._append
            return
        from rich.live import Live

        with Live(self._panels(), console=self._console, transient=True, refresh_per_second=12) as self._live:
            yield self._redraw

    def finish(self, results: Sequence[Generation]) -> None:
        self._names, self._texts = [row.name for row in results], [row.text for row in results]
        if self._console.is_terminal:
            self._console.print(self._panels())
        elif len(results) == 1:
            print(harmless(self._texts[0].removeprefix(self._written)))
        else:
            print("\n\n".join(harmless(f"--- {n}\n{t}") for n, t in zip(self._names, self._texts, strict=True)))
        cut = [row.name for row in results if row.ended == "context"]
        if cut:
            print(f"note: the base reads no further; cut off: {harmless(', '.join(cut))}", file=sys.stderr)

    def _append(self, row: int, text: str) -> None:
        if len(self._names) == 1 and text.startswith(self._written):
            print(harmless(text[len(self._written) :]), end="", flush=True)
            self._written = text

    def _redraw(self, row: int, text: str) -> None:
        self._texts[row] = text
        self._live.update(self._panels())

    def _panels(self) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        titled = zip(self._names, self._texts, strict=True)
        return Group(
            *(Panel(Text(harmless(text)), title=Text(harmless(name)), title_align="left") for name, text in titled)
        )


def _facts(found: Inspection) -> list[tuple[str, str]]:
    ranks = sorted({layer.rank for layer in found.layers})
    facts = [
        ("adapter", found.name),
        ("folder", str(found.folder)),
        ("digest", found.digest),
        ("base", found.config.base_model_name_or_path or "not said"),
        ("fingerprint", _fingerprint(found.base)),
        ("rank", ", ".join(map(str, ranks)) or "no pairs"),
        ("alpha", f"{found.config.lora_alpha:g}" + (" (rank-stabilised)" if found.config.use_rslora else "")),
        ("layers", str(len(found.layers))),
        (
            "saved whole",
            ", ".join(f"{key} {'×'.join(map(str, shape))}" for key, shape in found.saved.items()) or "none",
        ),
        ("parameters", f"{found.parameters:,}"),
        ("size", _size(found.bytes)),
        ("‖delta‖", f"{found.norm:.4g}"),
    ]
    return facts + [
        (key, _brief(value)) for key, value in found.record.items() if key in ("recipe", "seed", "metrics", "created")
    ]


def _plan(recipe: Recipe) -> str:
    lora = f" r={recipe.lora.r} alpha={recipe.lora.lora_alpha:g}" if recipe.method == "lora" else ""
    length = f"{recipe.train.get('num_train_epochs', 3):g} x the data"
    if recipe.train.get("max_steps", -1) > 0:
        length = f"{recipe.train['max_steps']} steps"
    rate = f"{recipe.train['learning_rate']:g}"
    what = f"{recipe.task}, {recipe.method}{lora} on {recipe.base}"
    return harmless(f"{what}: {recipe.data.train}, {length}, learning rate {rate} -> {recipe.out}")


def _train_facts(report: TrainReport) -> list[tuple[str, str]]:
    facts = [
        ("written", str(report.out)),
        ("trained", f"{report.trainable:,} of {report.parameters:,} parameters, {report.steps:,} steps"),
        ("time", f"{report.seconds:.1f} s, {report.tokens_per_second:,.0f} tokens/s"),
        ("memory", f"{_size(report.peak_bytes)} at the most"),
        ("training loss", f"{report.train_loss:.4f}"),
    ]
    before, after = (evaluation.metrics() if evaluation else {} for evaluation in (report.before, report.after))
    facts += [(f"validation {key}", f"{before[key]:.4f} before, {value:.4f} after") for key, value in after.items()]
    return facts + ([("digest", report.digest)] if report.digest else [])


def _merge_facts(report: MergeReport) -> list[tuple[str, str]]:
    worst = report.worst
    kept = f"{report.retention:.1%} of the delta survived rounding to {report.dtype}"
    return [
        ("merged", str(report.out)),
        ("base", report.base),
        ("adapter", report.adapter[:12]),
        (
            "retention",
            f"{kept}; least, {worst.retained:.1%}, in {worst.path}" if worst else "no pairs; saved modules replaced",
        ),
        ("read back", "every tensor, bit for bit"),
        ("logits", f"at most {report.largest_difference:.3g} from base + adapter; bound {report.bound:.3g}"),
        ("effect", f"the adapter changes a logit by up to {report.effect:.3g}"),
        ("size", _size(report.bytes)),
        ("time", f"{report.seconds:.1f} s"),
    ]


def _fingerprint(base: Mapping[str, Any] | None) -> str:
    if base is None:
        return "not said, so whether a base is the right one cannot be checked"
    weights = base.get("weights")
    count = len(weights) if isinstance(weights, Mapping) else 0
    return f"structure {str(base.get('structure'))[:12]}, {count} weights sampled"


def _brief(value: Any, *, most: int = 300) -> str:
    text = jsonlib.dumps(value, default=str) if isinstance(value, (Mapping, list, tuple)) else str(value)
    return text if len(text) <= most else f"{text[:most]}…"


def _metrics(values: Mapping[str, Any]) -> str:
    """The three that tell most of a record's metrics."""
    numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    order = [*(key for key in _TELLING if key in numbers), *(key for key in numbers if key not in _TELLING)]
    return ", ".join(f"{key} {numbers[key]:.4g}" for key in order[:3])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _size(count: int) -> str:
    """Bytes in powers of 1000."""
    if count < 1000:
        return f"{count} B"
    amount, unit = next(((count / f, u) for f, u in ((1e9, "GB"), (1e6, "MB")) if count >= f), (count / 1e3, "kB"))
    return f"{amount:.1f} {unit}"
