"""`parity`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from lora_kit.cli.app import Adapters, AsJson, Store, app
from lora_kit.cli.output import print_json, print_table
from lora_kit.names import DEFAULT_STORE


@app.command
def parity(
    url: str,
    *,
    base: str,
    adapter: Adapters,
    base_name: str | None = None,
    dtype: str = "fp32",
    prompts: int = 8,
    new_tokens: int = 24,
    together: Annotated[list[int] | None, Parameter(negative="")] = None,
    requests: int | None = None,
    key: str | None = None,
    json: AsJson = False,
    store: Store = DEFAULT_STORE,
) -> None:
    """Compare the answers of a server with our own, alone and mixed; exit code 4 if any differs.

    Example: lora-kit parity http://127.0.0.1:8000 --base kit-base --adapter pirate

    Args:
        url: Address of the server, such as http://127.0.0.1:8000.
        base: Base model: hub id, local folder or kit-base.
        base_name: What the server calls the base; by default the last part of --base.
        dtype: What the server computes in: fp32, bf16 or fp16. In 16 bits near ties differ.
        prompts: Prompts that each model is asked, of random tokens.
        new_tokens: Tokens of an answer.
        together: Requests on their way at once, may be repeated; by default 1 and 16.
        requests: Requests of each round, drawn from all prompts and models; by default each once.
        key: Bearer key.
    """
    from pathlib import Path

    from lora_kit.adapter.adapter import Adapter
    from lora_kit.errors import VerificationError
    from lora_kit.models.loading import load_base
    from lora_kit.serving.parity import check_parity, read_named_adapters, write_questions

    models: dict[str, Adapter | None] = {base_name or Path(base).name: None}
    models |= read_named_adapters(adapter, store=store)
    questions = write_questions(load_base(base, dtype=dtype), models, prompts=prompts, new_tokens=new_tokens)
    report = check_parity(url, questions, key=key, together=together or (1, 16), requests=requests)
    if json:
        print_json(report.to_json())
    else:
        print(f"{report.asked} requests, {len(report.wrong)} wrong")
        rows = [(w.model, w.answered_by or "nobody", str(w.together)) for w in report.wrong[:20]]
        print_table(("asked", "answered by", "at once"), rows)
    if report.wrong:
        raise VerificationError(f"{len(report.wrong)} of {report.asked} answers are not ours")
