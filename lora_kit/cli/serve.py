"""`serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from lora_kit.cli.app import Store, app
from lora_kit.errors import ConfigError
from lora_kit.names import DEFAULT_STORE


@app.command
def serve(
    *,
    base: str | None = None,
    store: Store = DEFAULT_STORE,
    host: str = "127.0.0.1",
    port: int = 8000,
    task: str | None = None,
    labels: int = 0,
    dtype: str = "auto",
    quantize: str | None = None,
    slots: int = 16,
    max_rank: int = 64,
    rows: int = 32,
    context: int | None = None,
    alias: Annotated[list[str] | None, Parameter(negative="")] = None,
    keys: Path | None = None,
    rate: str | None = None,
    state: Path | None = None,
    emit: str | None = None,
    out: Path | None = None,
) -> None:
    """Serve the base and the adapters of a store over HTTP, in OpenAI's API.

    Example: lora-kit serve --store adapters

    Args:
        base: Base model: hub id, local folder or kit-base; by default the one that the store's adapters name, where it
            is here.
        host: Address to listen at; other than 127.0.0.1 needs --keys.
        port: Port to listen at.
        task: causal-lm, seq2seq or classify; adapters of another task are not offered. By default what they are for.
        labels: Labels of a classifier's adapter, at most; by default those of the widest in the store.
        dtype: Of the base: auto, bf16, fp16 or fp32.
        quantize: Load the base in nf4, nf4-double, fp4, fp4-double or int8.
        slots: Adapters that are ready at once; others of the store come in when they are asked for.
        max_rank: The largest rank of an adapter.
        rows: Requests that run at once.
        context: Tokens of prompt and answer, at most; by default what the base reads.
        alias: Another name of an adapter, NAME=ADAPTER; may be repeated.
        keys: File with the sha256 of bearer keys, and what each may do.
        rate: Requests of one key, such as 60/minute.
        state: File that keeps what was loaded, aliased and pinned at run time.
        emit: Start nothing; write what this other server needs to serve the same: vllm.
        out: Folder to write it into.
    """
    flags: dict[str, Any] = dict(locals())
    base = flags["base"] = base or _infer_served_base(store, task)
    from lora_kit.serving.serve import serve as run
    from lora_kit.serving.server_settings import ServerSettings

    fields = {name: value for name, value in flags.items() if name not in ("alias", "emit", "out")}
    settings = ServerSettings(**fields, aliases=dict(_parse_alias(text) for text in alias or ()))
    if emit is None and out is None:
        run(settings, on_ready=lambda address: print(f"serving {base} at {address}; stop with Ctrl-C", flush=True))
        return
    if emit != "vllm" or out is None:
        raise ConfigError(f"--emit {emit} --out {out}: both are needed", hint="--emit vllm --out FOLDER")
    from lora_kit.serving.vllm_handover import LAUNCH, write_vllm_handover  # all that exports

    print("\n".join([f"written: {out}/{LAUNCH}", *write_vllm_handover(settings, out)]))


def _infer_served_base(store: Path, task: str | None) -> str:
    """Return the base that the adapters of a store name; of a task that is given only those that it offers.

    Raises:
        ConfigError: there are none, or they name different bases.
    """
    from lora_kit.models.infer_base import infer_base
    from lora_kit.serving.adapter_labels import list_adapter_folders
    from lora_kit.serving.adapter_tasks import can_offer, read_adapter_task

    folders = [folder for folder in list_adapter_folders(store) if can_offer(read_adapter_task(folder), task)]
    if not folders:
        raise ConfigError(f"{store} has no adapter that names a base", hint="give the base with --base")
    return infer_base(folders, store=store)


def _parse_alias(text: str) -> tuple[str, str]:
    name, equals, adapter = text.partition("=")
    if not (name and equals and adapter):
        raise ConfigError(f"--alias {text!r}: NAME=ADAPTER was expected", hint="--alias chat=pirate")
    return name, adapter
