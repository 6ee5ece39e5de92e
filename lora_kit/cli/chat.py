"""`chat`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lora_kit.cli.app import Store, app
from lora_kit.cli.output import print_notice, print_text
from lora_kit.errors import ConfigError, LoraKitError
from lora_kit.io.text import escape_for_terminal
from lora_kit.names import DEFAULT_STORE

if TYPE_CHECKING:
    from lora_kit.serving.chat_session import ChatSession


@app.command
def chat(
    *,
    adapter: str | None = None,
    base: str | None = None,
    system: str = "",
    max_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: str = "auto",
    quantize: str | None = None,
    store: Store = DEFAULT_STORE,
) -> None:
    """Talk with an adapter; /help lists what can be typed besides messages.

    Example: lora-kit chat --adapter pirate

    Args:
        adapter: Who answers: a folder, a name in the store, or a hub id; by default the base.
        base: Base model: hub id, local folder or kit-base; by default the one that the adapter names, where it is here.
        system: Instructions that the conversation begins with.
        max_tokens: Tokens of an answer, at most.
        temperature: 0 decodes greedily; above 0 samples.
        top_p: Sample from the most probable tokens whose probabilities add up to this.
        seed: Seed of the sampling.
        dtype: Of the base: auto, bf16, fp16 or fp32.
        quantize: Load the base in nf4, nf4-double, fp4, fp4-double or int8.
    """
    try:
        from lora_kit.serving.served_model import ServedModel
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed", hint="pip install 'lora-kit[serve]'") from error
    from lora_kit.models.infer_base import infer_base
    from lora_kit.serving.chat_session import ChatSession
    from lora_kit.serving.sampler import SamplingSettings
    from lora_kit.serving.server_settings import ServerSettings

    sampling = SamplingSettings(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    name = base or infer_base([adapter] if adapter else [], store=store)
    served = ServedModel(ServerSettings(base=name, store=store, dtype=dtype, quantize=quantize, slots=4, rows=4))
    try:
        if served.heads is not None:
            raise ConfigError(f"{name} predicts labels; it writes no text", hint="lora-kit predict")
        session = ChatSession(served, sampling, store)
        session.use(adapter)
        session.set_system(system)
        _talk(session)
    finally:
        served.close()


def _talk(session: ChatSession) -> None:
    """Read lines until the end of the input or `/quit`; an error is shown, and the conversation goes on."""
    from lora_kit.serving.chat_session import list_commands, run_command

    is_terminal = sys.stdin.isatty()
    while (line := _read_line(session.label if is_terminal else "")) is not None:
        try:
            if line == "/quit":
                return
            if line == "/help":
                print_text("\n".join(list_commands()))
            elif line.startswith("/"):
                print_text(run_command(session, line))
            elif line:
                _show_answer(session, line)
        except LoraKitError as error:
            if not is_terminal:  # a script must not go on as if nothing had happened
                raise
            print_notice("error", error.message, hint=error.hint)


def _read_line(label: str) -> str | None:
    """Return the next line, None at the end of the input."""
    try:
        return input(f"{escape_for_terminal(label)}> " if label else "").strip()
    except EOFError:
        return None


def _show_answer(session: ChatSession, text: str) -> None:
    """Print an answer as it grows; Ctrl-C ends the answer, not the conversation."""
    answer = session.ask(text)
    try:
        for part in answer:
            print(escape_for_terminal(part), end="", flush=True)
    except KeyboardInterrupt:
        answer.close()
        print(" [stopped; not in the history]", end="")
    print(flush=True)
