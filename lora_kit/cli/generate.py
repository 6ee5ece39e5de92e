"""`generate`."""

from __future__ import annotations

import contextlib
import dataclasses
import json as json_format
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypedDict

from cyclopts import Parameter

from lora_kit.cli.app import Adapters, Allow, Replace, Store, app
from lora_kit.cli.eval import show_row_progress
from lora_kit.cli.output import create_console, print_json, print_text
from lora_kit.cli.process import show_progress_lines
from lora_kit.errors import ConfigError
from lora_kit.io.text import escape_for_terminal
from lora_kit.names import DEFAULT_STORE

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from lora_kit.generation.decoding import Sampling
    from lora_kit.generation.generate import Generation

_JSON_HELP: Final = (
    "Print the answers to a prompt as one JSON document. Those to a file are JSON Lines anyway, a line for each row "
    "and adapter, unless --out writes them."
)
_AnswersAsJson = Annotated[bool, Parameter(name="--json", negative="", help=_JSON_HELP)]


@app.command
def generate(
    prompt: str | None = None,
    *,
    adapter: Adapters | None = None,
    base: str | None = None,
    data: Path | None = None,
    out: Path | None = None,
    replace: Replace = False,
    quantize: str | None = None,
    compare: Annotated[bool, Parameter(negative="")] = False,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    raw: Annotated[bool, Parameter(negative="")] = False,
    allow: Allow = None,
    store: Store = DEFAULT_STORE,
    json: _AnswersAsJson = False,
) -> None:
    """Answer a prompt with several adapters, side by side, in one batch.

    Example: lora-kit generate --adapter pirate --prompt "my friend sees the ship"

    Args:
        prompt: The prompt.
        base: Base model: hub id, local folder or kit-base; by default the one that the adapters name, where it is here.
        data: File of rows with prompt or messages, or .txt with a prompt on each line; a column adapter may name who
            answers a row, else every --adapter does.
        out: File for the answers to a file, as JSONL; a command that was stopped goes on when it is given again.
        quantize: Load it in nf4, nf4-double, fp4, fp4-double or int8.
        compare: Show the answer of the base alone as well.
        batch_size: Prompts of a file at once.
        max_new_tokens: Tokens of an answer, at most.
        temperature: 0 decodes greedily; above 0 samples.
        top_p: Sample from the most probable tokens whose probabilities add up to this.
        seed: Seed of the sampling.
        raw: Use the prompt as it is, without the separator or chat template of the training.
    """
    from lora_kit.generation.decoding import Sampling
    from lora_kit.models.infer_base import infer_base

    _check_given(prompt, data, out)
    rows: list[str | None] = [*([None] if compare or not adapter else []), *(adapter or [])]
    options: _Options = {
        "sampling": Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed),
        "template": "raw" if raw else "adapter",
        "store": store,
        "allow": allow or (),
        "quantize": quantize,
    }
    if data is not None:
        named = adapter or _list_named_adapters(data, store)
        given = rows if adapter or compare else []
        chosen = base or infer_base(named, store=store)
        _answer_file(chosen, given, data, out, options, batch_size=batch_size, replace=replace)
    else:
        assert prompt is not None
        _answer_prompt(base or infer_base(adapter or [], store=store), rows, prompt, options, json=json)


def _check_given(prompt: str | None, data: Path | None, out: Path | None) -> None:
    if (prompt is None) == (data is None):
        raise ConfigError(
            "generate takes either a prompt or --data", hint="lora-kit generate --adapter mine 'a prompt'"
        )
    if out is not None and data is None:
        raise ConfigError("--out goes with --data")


class _Options(TypedDict):
    """What a prompt and a file have in common."""

    sampling: Sampling
    template: Literal["adapter", "raw"]
    store: Path
    allow: Sequence[str]
    quantize: str | None


def _list_named_adapters(data: Path, store: Path) -> list[str]:
    from lora_kit.generation.prompt_file import read_prompt_file

    return [name for name in read_prompt_file(data).list_named_adapters(store) if name]


def _answer_prompt(base: str, rows: list[str | None], prompt: str, options: _Options, *, json: bool) -> None:
    from lora_kit.generation.adapter_args import BASE_ROW
    from lora_kit.generation.generate import generate as run

    if json:
        print_json([dataclasses.asdict(each) for each in run(base, rows, prompt, **options)])
        return
    screen = _AnswerDisplay([BASE_ROW if row is None else Path(row).name for row in rows])
    with screen.stream_rows() as on_text:
        results = run(base, rows, prompt, on_text=on_text, **options)
    screen.finish(results)


def _answer_file(
    base: str,
    rows: list[str | None],
    data: Path,
    out: Path | None,
    options: _Options,
    *,
    batch_size: int,
    replace: bool,
) -> None:
    from lora_kit.generation.generate_file import generate_file

    with show_progress_lines(), show_row_progress() as on_progress:
        answers = generate_file(
            base,
            rows,
            data,
            out=out,
            batch_size=batch_size,
            replace=replace,
            on_progress=lambda done, total: on_progress("answers", done, total),
            **options,
        )
    cut = sum(each.generation.ended != "eos" for each in answers)
    if cut:
        print(f"note: {cut:,} of {len(answers):,} answers were cut off; raise --max-new-tokens", file=sys.stderr)
    if out is None:
        for each in answers:
            print(json_format.dumps(each.to_json()))
    else:
        print_text(f"written: {out}, {len(answers):,} answers")


class _AnswerDisplay:
    """Show answers as they are written: panels on a terminal; elsewhere one row as it comes, several at the end."""

    def __init__(self, names: Sequence[str]) -> None:
        self._console = create_console()
        self._names = list(names)
        self._texts = [""] * len(names)
        self._written = ""
        self._live: Live | None = None

    @contextlib.contextmanager
    def stream_rows(self) -> Iterator[Callable[[int, str], None]]:
        if not self._console.is_terminal:
            yield self._append
            return
        from rich.live import Live

        with Live(self._render_panels(), console=self._console, transient=True, refresh_per_second=12) as self._live:
            yield self._redraw

    def finish(self, results: Sequence[Generation]) -> None:
        self._names, self._texts = [row.name for row in results], [row.text for row in results]
        if self._console.is_terminal:
            self._console.print(self._render_panels())
        elif len(results) == 1:
            print(escape_for_terminal(self._texts[0].removeprefix(self._written)))
        else:
            print(
                "\n\n".join(escape_for_terminal(f"--- {n}\n{t}") for n, t in zip(self._names, self._texts, strict=True))
            )
        cut = [row.name for row in results if row.ended == "context"]
        if cut:
            print(
                f"note: the context of the base is full; cut off: {escape_for_terminal(', '.join(cut))}",
                file=sys.stderr,
            )

    def _append(self, row: int, text: str) -> None:
        if len(self._names) == 1 and text.startswith(self._written):
            print(escape_for_terminal(text[len(self._written) :]), end="", flush=True)
            self._written = text

    def _redraw(self, row: int, text: str) -> None:
        self._texts[row] = text
        assert self._live is not None
        self._live.update(self._render_panels())

    def _render_panels(self) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        titled = zip(self._names, self._texts, strict=True)
        return Group(
            *(
                Panel(Text(escape_for_terminal(text)), title=Text(escape_for_terminal(name)), title_align="left")
                for name, text in titled
            )
        )
