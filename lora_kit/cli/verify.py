"""`verify`."""

from __future__ import annotations

from pathlib import Path

from lora_kit.cli.app import AsJson, Store, app
from lora_kit.cli.output import print_json, print_table
from lora_kit.names import DEFAULT_STORE


@app.command
def verify(adapter: str, /, *, key: Path, store: Store = DEFAULT_STORE, json: AsJson = False) -> None:
    """Verify the signature of an adapter with the public key of its owner.

    Exit code 4 if the adapter is not what was signed.

    Args:
        adapter: A folder, a name in the store, or a hub id.
        key: The public key: a PEM file.
    """
    from lora_kit.adapter.signing import verify as run
    from lora_kit.adapter.store import find_adapter

    signed = run(find_adapter(adapter, store=store), key=key)
    if json:
        print_json({"verified": True, "digest": signed.digest})
        return
    print_table(("", ""), [("signed", "by the owner of this key, and unchanged since"), ("digest", signed.digest)])
