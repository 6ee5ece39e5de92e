"""`generate`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lora_kit.cli.app import Adapters, Allow, Store, app
from lora_kit.cli.output import create_console
from lora_kit.io.text import escape_for_terminal
from lora_kit.names import DEFAULT_STORE

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from lora_kit.generation.generate import Generation


@app.command
def generate(
    *,
    prompt: str,
    adapter: Adapters | None = None,
    base: str | None = None,
    quantize: str | None = None,
    compare: Annotated[bool, Parameter(negative="")] = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    raw: Annotated[bool, Parameter(negative="")] = False,
    allow: Allow = None,
    store: Store = DEFAULT_STORE,
) -> None:
    """Answer a prompt with several adapters, side by side, in one batch.

    Example: lora-kit generate --adapter pirate --prompt "my friend sees the ship"

    Args:
        prompt: The prompt.
        base: Base model: hub id, local folder or kit-base; by default the one that the adapters name, where it is here.
        quantize: Load it in nf4, nf4-double, fp4, fp4-double or int8.
        compare: Show the answer of the base alone as well.
        max_new_tokens: Tokens of an answer, at most.
        temperature: 0 decodes greedily; above 0 samples.
        top_p: Sample from the most probable tokens whose probabilities add up to this.
        seed: Seed of the sampling.
        raw: Use the prompt as it is, without the separator or chat template of the training.
    """
    from lora_kit.generation.adapter_args import BASE_ROW
    from lora_kit.generation.decoding import Sampling
    from lora_kit.generation.generate import generate as run
    from lora_kit.models.infer_base import infer_base

    rows: list[str | None] = [*([None] if compare or not adapter else []), *(adapter or [])]
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    screen = _AnswerDisplay([BASE_ROW if row is None else Path(row).name for row in rows])
    with screen.stream_rows() as on_text:
        results = run(
            base or infer_base(adapter or [], store=store),
            rows,
            prompt,
            sampling=sampling,
            template="raw" if raw else "adapter",
            store=store,
            allow=allow or (),
            quantize=quantize,
            on_text=on_text,
        )
    screen.finish(results)


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
